"""Calibration: text to windows of tokens, no padding and nothing added between them."""

import json
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from endor.errors import CheckpointError, ConfigError
from endor.pruning.contract import PruneOptions

if TYPE_CHECKING:
    import torch

SHIPPED = "data/wiki_calib.txt"


def shipped_text() -> Path:
    """Return the text that comes with the package: Wikipedia articles, see `data/ORIGIN.md`."""
    return Path(str(files("endor.pruning").joinpath(SHIPPED)))


def read_documents(path: Path, tokenizer: Any, *, chat_template: bool) -> list[str]:
    """Return the documents of a text file (one) or a JSONL file (one a line).

    A JSONL line is a string, or an object with `text`, `content` or `messages`; messages are
    rendered with the tokenizer's chat template when `chat_template` is set, else joined.

    Raises:
        ConfigError: The file is empty or a line is none of these.
        OSError: It cannot be read.
    """
    text = path.read_text(encoding="utf-8")
    if path.suffix not in (".jsonl", ".ndjson"):
        documents = [text]
    else:
        lines = [line for line in text.splitlines() if line.strip()]
        documents = [
            _document(path, number, line, tokenizer, chat_template)
            for number, line in enumerate(lines, 1)
        ]
    if not any(document.strip() for document in documents):
        raise ConfigError(f"{path}: calibration text is empty; give text like what the model sees")
    return documents


def _document(path: Path, number: int, line: str, tokenizer: Any, chat_template: bool) -> str:
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}:{number}: must be JSON: {error}") from None
    if isinstance(value, str):
        return value
    if isinstance(value, dict):
        messages = value.get("messages")
        if isinstance(messages, list):
            if chat_template:
                return _rendered(path, number, messages, tokenizer)
            return "\n".join(str(message.get("content", "")) for message in messages)
        for key in ("text", "content"):
            if isinstance(value.get(key), str):
                return str(value[key])
    raise ConfigError(
        f"{path}:{number}: must be a string, or an object with text, content or messages"
    )


def _rendered(path: Path, number: int, messages: list[Any], tokenizer: Any) -> str:
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False))
    except (ValueError, TypeError) as error:
        raise ConfigError(
            f"{path}:{number}: the tokenizer's chat template cannot render it: {error}"
        ) from None


def calibration_windows(directory: Path | None, options: PruneOptions) -> "torch.Tensor":
    """Return token ids, int64 `(windows, seq_len)`.

    Documents are joined and cut into consecutive windows. With seed 0 the first `samples` of them
    are taken, with another seed as many at random, in text order; a shorter text gives fewer. Each
    window starts with the beginning-of-sequence token iff the tokenizer adds it by itself.

    Raises:
        ConfigError: The text is shorter than one window.
    """
    import torch

    tokenizer = _tokenizer(directory)
    path = options.calibration or shipped_text()
    documents = read_documents(path, tokenizer, chat_template=options.chat_template)
    separator = [] if len(documents) == 1 else _separator(tokenizer)
    ids: list[int] = []
    for document in documents:
        ids += tokenizer(document, add_special_tokens=False, verbose=False).input_ids
        ids += separator
    start = _start(tokenizer)
    body = options.seq_len - len(start)
    count = len(ids) // body if body > 0 else 0
    if not count:
        raise ConfigError(
            f"{path}: {len(ids)} tokens do not fill one window of {options.seq_len}; give more "
            "text, or a smaller seq_len"
        )
    windows = torch.tensor(ids[: count * body], dtype=torch.int64).view(count, body)
    if options.seed and count > options.samples:
        generator = torch.Generator().manual_seed(options.seed)
        chosen = torch.randperm(count, generator=generator)[: options.samples].sort().values
        windows = windows[chosen]
    windows = windows[: options.samples]
    lead = torch.tensor(start, dtype=torch.int64).expand(len(windows), -1)
    return torch.cat([lead, windows], dim=1)


def _tokenizer(directory: Path | None) -> Any:
    from transformers import AutoTokenizer

    if directory is None:
        raise CheckpointError(
            "calibrated pruning needs a tokenizer beside the weights; give the model's directory, "
            "or prune with magnitude"
        )
    try:
        return AutoTokenizer.from_pretrained(directory)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{directory}: has no usable tokenizer: {error}") from None


def _start(tokenizer: Any) -> list[int]:
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and tokenizer("a").input_ids[0] == bos else []


def _separator(tokenizer: Any) -> list[int]:
    return [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
