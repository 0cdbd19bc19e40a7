"""How good a checkpoint is, packed or dense, on a text: what `endor eval` reports."""

import math
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

from endor.bench.quality.perplexity import (
    Agreement,
    Perplexity,
    Progress,
    agreement,
    perplexity,
    tokenize,
)
from endor.jsontext import read_utf8
from endor.trust import read_model_config, read_tokenizer

Precision = Literal["auto", "float32", "bfloat16", "float16"]


@dataclass(frozen=True, slots=True)
class Evaluation:
    """One checkpoint on one text.

    Attributes:
        model: Its directory.
        bits_per_weight: Of the packed matrices, metadata and padding included; of an element for a
            dense checkpoint; None when its config names no element type.
        dtype: Element type it was run in.
        perplexity: What was measured.
        agreement: How it follows the reference; None without one.
    """

    model: Path
    bits_per_weight: float | None
    dtype: str
    perplexity: Perplexity
    agreement: Agreement | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return one flat object for JSON; what is unknown or undefined is None."""
        out: dict[str, Any] = {
            "model": str(self.model),
            "bits_per_weight": self.bits_per_weight,
            "dtype": self.dtype,
            **asdict(self.perplexity),
        }
        if self.agreement is not None:
            out["reference_perplexity"] = self.agreement.reference.perplexity
            for name in ("kl", "kl_stderr", "top1", "nll_difference", "nll_difference_stderr"):
                out[name] = getattr(self.agreement, name)
        return {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in out.items()
        }


def shipped_text() -> Path:
    """Return the evaluation text that comes with the package: Jane Austen's Persuasion."""
    return Path(str(files("endor").joinpath("data/austen_persuasion.txt")))


def read_text(path: Path) -> str:
    """Return the text of a UTF-8 file.

    Raises:
        ConfigError: It is not UTF-8.
        OSError: It cannot be read.
    """
    return read_utf8(path, "the text")


def load(
    path: Path,
    *,
    ram: int | str | None = None,
    dtype: Precision = "auto",
    trust_remote_code: bool = False,
) -> Any:
    """Return the model of a packed or dense checkpoint, to be run on the CPU in `dtype`.

    Raises:
        CheckpointError: There is no checkpoint.
        ConfigError: `ram` was given for a dense checkpoint.
    """
    import torch

    from endor.hf.load import open_model

    return open_model(
        path,
        ram=ram,
        dtype=dtype if dtype == "auto" else getattr(torch, dtype),
        trust_remote_code=trust_remote_code,
    )


def evaluate(
    path: Path,
    text: str,
    *,
    reference: Any | None = None,
    window: int = 512,
    stride: int | None = None,
    max_windows: int | None = None,
    bos: bool | None = None,
    ram: int | str | None = None,
    dtype: Precision = "auto",
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> Evaluation:
    """Measure the checkpoint at `path` on `text`.

    Args:
        path: A packed or dense checkpoint with its tokenizer.
        text: What to score.
        reference: A loaded model to compare with, from `load`; None for perplexity alone.
        window, stride, max_windows, progress: See `endor.bench.quality.perplexity.perplexity`.
        bos: See `endor.bench.quality.perplexity.tokenize`.
        ram: Memory for packed weights.
        dtype: Element type to run in; "auto" is the checkpoint's own.
        trust_remote_code: Run Python code that comes with the checkpoint.

    Raises:
        CheckpointError: There is no checkpoint, or it has no tokenizer.
        ConfigError, ShapeError: See `endor.bench.quality.perplexity`.
    """
    model = load(path, ram=ram, dtype=dtype, trust_remote_code=trust_remote_code)
    tokenizer = read_tokenizer(path, trust_remote_code=trust_remote_code)
    tokens = tokenize(text, tokenizer, bos=bos)
    compared = None
    if reference is None:
        found = perplexity(
            model,
            tokens,
            window=window,
            stride=stride,
            max_windows=max_windows,
            progress=progress,
        )
    else:
        compared = agreement(
            model,
            reference,
            tokens,
            window=window,
            stride=stride,
            max_windows=max_windows,
            progress=progress,
        )
        found = compared.model
    return Evaluation(
        model=path,
        bits_per_weight=bits_per_weight(path, trust_remote_code=trust_remote_code),
        dtype=str(model.dtype).removeprefix("torch."),
        perplexity=found,
        agreement=compared,
    )


def bits_per_weight(path: Path, *, trust_remote_code: bool = False) -> float | None:
    """Return the stored bits per weight of the checkpoint at `path`; see `Evaluation`."""
    from endor.checkpoint import inspect_checkpoint
    from endor.checkpoint.loadable import is_packed

    if is_packed(path):
        return inspect_checkpoint(path).sizes.bits_per_weight
    element = read_model_config(path, trust_remote_code=trust_remote_code).dtype
    return 8.0 * element.itemsize if element is not None else None
