"""Calibration: text to windows of tokens, no padding and nothing added between them."""

from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from endor.errors import CheckpointError, ConfigError
from endor.jsontext import parse, read_utf8
from endor.pruning.contract import PruneOptions
from endor.trust import read_tokenizer

if TYPE_CHECKING:
    import torch

SHIPPED = {
    "wiki": "data/wiki_calib.txt",
    "austen": "data/austen_mansfield.txt",
    "python": "data/python_manual.txt",
    "web": "data/web_prose.txt",
}
"""Texts that come with the package; see `data/ORIGIN.md`."""

MIX = "mix"
"""Names all of them together: the default."""


def shipped_texts(name: str = MIX) -> tuple[Path, ...]:
    """Return the paths of the shipped text `name`, or of all of them for "mix".

    Raises:
        ConfigError: No text has that name.
    """
    if name != MIX and name not in SHIPPED:
        names = ", ".join([*SHIPPED, MIX])
        raise ConfigError(f"calibration: must be a file or one of {names}, got {name!r}")
    return tuple(
        Path(str(files("endor.pruning").joinpath(file)))
        for text, file in SHIPPED.items()
        if name in (text, MIX)
    )


def read_documents(path: Path, tokenizer: Any, *, chat_template: bool) -> list[str]:
    """Return the documents of a text file (one) or a JSONL file (one a line).

    A JSONL line is a string, or an object with `text`, `content` or `messages`; messages are
    rendered with the tokenizer's chat template when `chat_template` is set, else joined.

    Raises:
        ConfigError: The file is empty or a line is none of these.
        OSError: It cannot be read.
    """
    text = read_utf8(path, "calibration text")
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
    value = parse(
        line, f"{path}:{number}:", error=ConfigError, lenient=True, advice="correct the line"
    )
    if isinstance(value, str):
        return value
    if isinstance(value, dict):
        messages = value.get("messages")
        if isinstance(messages, list):
            if chat_template:
                return _rendered(path, number, messages, tokenizer)
            if not all(isinstance(message, dict) for message in messages):
                raise ConfigError(f"{path}:{number}: every message must be an object")
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
    except Exception as error:  # a template is a program of the model's author
        raise ConfigError(
            f"{path}:{number}: the tokenizer's chat template cannot render it: {error}"
        ) from None


def calibration_windows(directory: Path | None, options: PruneOptions) -> "torch.Tensor":
    """Return token ids, int64 `(windows, seq_len)`.

    The documents of a text are joined and cut into consecutive windows; several texts take turns,
    window by window, so that any number of samples holds equal shares of them (a text that ends
    early leaves its turns to the others). With seed 0 the first `samples` windows are taken, with
    another seed as many at random out of each text, in text order; shorter texts give fewer. Each
    window starts with the beginning-of-sequence token iff the tokenizer adds it by itself.

    Raises:
        ConfigError: A text is shorter than one window.
    """
    import torch

    tokenizer = _tokenizer(directory, options)
    start = _start(tokenizer)
    texts = [
        _text_windows(path, tokenizer, options, options.seq_len - len(start))
        for path in options.calibration or shipped_texts()
    ]
    turns = [(turn, text) for text, windows in enumerate(texts) for turn in range(len(windows))]
    turns = sorted(turns)[: options.samples]
    generator = torch.Generator().manual_seed(options.seed)
    for text, windows in enumerate(texts):
        count = sum(owner == text for _, owner in turns)
        if options.seed and count < len(windows):
            chosen = torch.randperm(len(windows), generator=generator)[:count].sort().values
            texts[text] = windows[chosen]
    windows = torch.stack([texts[text][turn] for turn, text in turns])
    lead = torch.tensor(start, dtype=torch.int64).expand(len(windows), -1)
    return torch.cat([lead, windows], dim=1)


def calibration_and_held_out(
    directory: Path | None, options: PruneOptions, held_out: int
) -> "tuple[torch.Tensor, torch.Tensor]":
    """Return calibration windows as without, and `held_out` windows of the same texts after them.

    Where the texts are too short for both, at most a quarter of their windows is held out.

    Raises:
        ConfigError: A text is shorter than one window, or there is but one window in all.
    """
    if not held_out:
        windows = calibration_windows(directory, options)
        return windows, windows[:0]
    more = replace(options, samples=options.samples + held_out)
    windows = calibration_windows(directory, more)
    count = min(held_out, max(1, len(windows) // 4))
    if count == len(windows):
        raise ConfigError(
            f"calibration: one window of {options.seq_len} tokens leaves none to measure quality "
            "on; give more text, a smaller seq_len, or bits"
        )
    return windows[:-count], windows[-count:]


def _text_windows(path: Path, tokenizer: Any, options: PruneOptions, length: int) -> "torch.Tensor":
    """Return all windows of one text, int64 `(windows, length)`."""
    import torch

    documents = read_documents(path, tokenizer, chat_template=options.chat_template)
    separator = [] if len(documents) == 1 else _separator(tokenizer)
    ids: list[int] = []
    for document in documents:
        ids += tokenizer(document, add_special_tokens=False, verbose=False).input_ids
        ids += separator
    count = len(ids) // length if length > 0 else 0
    if not count:
        raise ConfigError(
            f"{path}: {len(ids)} tokens do not fill one window of {options.seq_len}; give more "
            "text, or a smaller seq_len"
        )
    return torch.tensor(ids[: count * length], dtype=torch.int64).view(count, length)


def _tokenizer(directory: Path | None, options: PruneOptions) -> Any:
    if directory is None:
        raise CheckpointError(
            "calibrated pruning needs a tokenizer beside the weights; give the model's directory, "
            "or prune with magnitude"
        )
    return read_tokenizer(directory, trust_remote_code=options.trust_remote_code)


def _start(tokenizer: Any) -> list[int]:
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and tokenizer("a").input_ids[0] == bos else []


def _separator(tokenizer: Any) -> list[int]:
    return [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
