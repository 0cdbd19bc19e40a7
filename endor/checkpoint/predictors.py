"""What guesses the active neurons of a feed-forward block from its input: a file beside the shards.

A predictor is two small matrices and a bias, of rank r between the block's input and its neurons
(Deja Vu, arXiv 2310.17157; PowerInfer, arXiv 2312.12456). It is of use to who accepts that a
neuron may be missed; without being asked for, nothing reads it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from endor.checkpoint.beside import Beside
from endor.checkpoint.companions import PREDICTORS_NAME
from endor.errors import FormatError
from endor.storage import FileLayout
from endor.storage.safetensors import Entry, brief, is_count

PREDICTORS = Beside(
    PREDICTORS_NAME,
    "endor.predictors",
    frozenset({"recall", "tokens", "calibration", "found"}),
)

_FOUND = ("active", "recall", "rows")
_INFINITE = 0x7F80


@dataclass(frozen=True, slots=True)
class Predictor:
    """Guesses which rows of a first matrix give an active neuron: `up @ (down @ x) + bias > 0`.

    Attributes:
        down: bf16 bits `(rank, cols)`.
        up: bf16 bits `(rows, rank)`.
        bias: float32 `(rows,)`.
        recall: Share of the active neurons that it found, in tokens that it was not made from.
        rows: Share of all neurons that it named there.
        active: Share of all neurons that were active there.
    """

    down: np.ndarray
    up: np.ndarray
    bias: np.ndarray
    recall: float
    rows: float
    active: float

    @property
    def nbytes(self) -> int:
        """Memory that it takes."""
        return self.down.nbytes + self.up.nbytes + self.bias.nbytes


@dataclass(frozen=True, slots=True)
class Predictors:
    """The predictors of a checkpoint.

    Attributes:
        matrices: By the name of the first matrix whose rows it names.
        recall: What was asked for.
        tokens: Tokens that recall and rows were found on.
        calibration: What they were made from: windows, seq_len, seed, and the names of the texts.
    """

    matrices: Mapping[str, Predictor]
    recall: float
    tokens: int
    calibration: Mapping[str, Any] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Bytes of all of them."""
        return sum(each.nbytes for each in self.matrices.values())

    @property
    def named(self) -> dict[str, tuple[float, int]]:
        """Share of the rows that each names, and the bytes that it takes in use, as float32."""
        return {
            name: (each.rows, 2 * (each.down.nbytes + each.up.nbytes) + each.bias.nbytes)
            for name, each in self.matrices.items()
        }

    def mean(self, figure: str) -> float:
        """Return `recall`, `rows` or `active`, the mean over neurons."""
        sizes = [len(each.bias) for each in self.matrices.values()]
        values = [float(getattr(each, figure)) for each in self.matrices.values()]
        weights = sizes
        if figure == "recall":  # a share of those that are active
            each = self.matrices.values()
            weights = [round(len(one.bias) * one.active * self.tokens) for one in each]
        total = sum(weights)
        return sum(v * w for v, w in zip(values, weights, strict=True)) / total if total else 1.0

    def to_dict(self) -> dict[str, Any]:
        """Return what they come to, for JSON."""
        return {
            "lossy": True,
            "matrices": len(self.matrices),
            "nbytes": self.nbytes,
            "recall": self.mean("recall"),
            "rows": self.mean("rows"),
            "active": self.mean("active"),
            "asked_recall": self.recall,
            "tokens": self.tokens,
            "calibration": dict(self.calibration),
        }

    def to_bytes(self, layouts: Sequence[FileLayout]) -> bytes:
        """Return the file, for the checkpoint of these shards."""
        names = sorted(self.matrices)
        arrays = {f"{name}_bias": ("F32", self.matrices[name].bias) for name in names}
        for name in names:
            arrays[f"{name}_down"] = ("BF16", self.matrices[name].down)
            arrays[f"{name}_up"] = ("BF16", self.matrices[name].up)
        found = {
            name: {figure: getattr(self.matrices[name], figure) for figure in _FOUND}
            for name in names
        }
        about = {
            "recall": self.recall,
            "tokens": self.tokens,
            "calibration": dict(self.calibration),
            "found": found,
        }
        return PREDICTORS.to_bytes(about, names, arrays, layouts)


def read_predictors(packed: Path, layouts: Sequence[FileLayout]) -> Predictors | None:
    """Return the predictors of a packed checkpoint; None where it has none.

    Args:
        packed: The directory.
        layouts: Its shards.

    Raises:
        CheckpointError: The index names them and they are missing, or they are another packing's.
        FormatError: They are damaged, or of a version that is not known.
    """
    path = PREDICTORS.find(packed)
    return None if path is None else parse_predictors(path, layouts)


def parse_predictors(path: Path, layouts: Sequence[FileLayout]) -> Predictors:
    """Return the predictors in a file, checked; errors as for `read_predictors`."""
    about, arrays = PREDICTORS.read(path, layouts)
    tokens, recall, found = about["tokens"], about["recall"], about["found"]
    if not is_count(tokens) or not _is_share(recall) or not isinstance(about["calibration"], dict):
        raise FormatError(
            f"{path}: tokens must be a count, recall a share and calibration an object, got "
            f"{brief(tokens)}, {brief(recall)} and {brief(about['calibration'])}; pack the model "
            "again"
        )
    names = set(about["records"])
    expected = {f"{name}_{suffix}" for name in names for suffix in ("bias", "down", "up")}
    if not isinstance(found, dict) or found.keys() != names or arrays.keys() != expected:
        raise FormatError(
            f"{path}: records, found and arrays must be of the same matrices, got "
            f"{brief(sorted(names))} and {brief(sorted(arrays))}; pack the model again"
        )
    specs = {name: entry.spec for layout in layouts for name, entry in layout.tensors.items()}
    matrices = {}
    for name in sorted(names):
        spec, figures = specs[name], found[name]
        down, up, bias = (arrays[f"{name}_{suffix}"] for suffix in ("down", "up", "bias"))
        rank = down[0].shape[0] if len(down[0].shape) == 2 else 0
        if len(spec.shape) != 2 or spec.transposed or not rank:
            raise FormatError(
                f"{path}: {name}: must be a matrix that is stored by row and have a predictor of "
                f"a rank of at least 1, got {list(spec.shape)} and {list(down[0].shape)}; pack the "
                "model again"
            )
        rows, cols = spec.shape
        shapes = {"down": (rank, cols), "up": (rows, rank), "bias": (rows,)}
        for suffix, (entry, values) in zip(shapes, (down, up, bias), strict=True):
            _check_array(path, f"{name}_{suffix}", entry, values, shapes[suffix])
        if (
            not isinstance(figures, dict)
            or figures.keys() != set(_FOUND)
            or not all(map(_is_share, figures.values()))
        ):
            raise FormatError(
                f"{path}: {name}: {', '.join(_FOUND)} must be shares from 0 to 1, got "
                f"{brief(figures)}; pack the model again"
            )
        matrices[name] = Predictor(down[1], up[1], bias[1], **figures)
    return Predictors(matrices, float(recall), tokens, about["calibration"])


def _check_array(
    path: Path, name: str, entry: Entry, values: np.ndarray, shape: tuple[int, ...]
) -> None:
    dtype = "F32" if len(shape) == 1 else "BF16"
    if (entry.dtype, entry.shape) != (dtype, shape):
        raise FormatError(
            f"{path}: {name}: must be {dtype} {list(shape)}, got {entry.dtype} "
            f"{list(entry.shape)}; pack the model again"
        )
    finite = np.isfinite(values) if dtype == "F32" else values & _INFINITE != _INFINITE
    if not finite.all():
        raise FormatError(f"{path}: {name}: must be finite numbers; pack the model again")


def _is_share(value: object) -> bool:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and 0 <= float(value) <= 1  # type: ignore[arg-type]
