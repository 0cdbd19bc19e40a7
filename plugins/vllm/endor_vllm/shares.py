"""Which part of a stored tensor a layer takes, and that part in stored form.

Nothing here knows vLLM. A stored tensor is handed to the model's own loading code in dense form,
so that whatever this does with it is right; what arrives at a layer as a piece of the stored one is
kept packed as it is stored, and anything else is packed again.
"""

from dataclasses import dataclass

import numpy as np
import torch

from endor import kernels
from endor.codecs import CodecChoice, Encoded
from endor.codecs.integer import steps_of
from endor.dtypes import endor_dtype, torch_dtype
from endor.packed import bits_of


@dataclass(slots=True, eq=False)
class Stored:
    """A tensor of the checkpoint, while it is loaded.

    Attributes:
        name: In the checkpoint.
        encoded: Its stored form, in memory of its own.
        version: How often the dense tensor had been written to when it was handed out.
        taken: Whether a layer keeps it packed.
    """

    name: str
    encoded: Encoded
    version: int
    taken: bool = False


def mark(dense: torch.Tensor, name: str, encoded: Encoded) -> Stored:
    """Note on `dense` which stored tensor it is the dense form of."""
    stored = Stored(name, encoded, dense._version)
    dense.endor = stored  # type: ignore[attr-defined]
    return stored


def take(loaded: torch.Tensor) -> tuple[Stored | None, Encoded]:
    """Return a matrix that a layer is given in stored form, and what it is a part of.

    Args:
        loaded: `(rows, cols)`: marked, a view of what is marked, or anything else.
    """
    base = loaded if hasattr(loaded, "endor") else loaded._base
    stored: Stored | None = getattr(base, "endor", None)
    if stored is not None and base is not None:
        place = _place(loaded, base, stored)
        if place is not None:
            stored.taken = True
            return stored, cut(stored.encoded, loaded, *place)
    return None, pack(loaded)


def pack(matrix: torch.Tensor, codec: CodecChoice = "auto") -> Encoded:
    """Return a matrix in stored form, in memory of its own."""
    bits = bits_of(matrix.detach())
    return _owned(kernels.encode(bits, endor_dtype(matrix.dtype), codec=codec))


def cut(encoded: Encoded, dense: torch.Tensor, row: int, col: int) -> Encoded:
    """Return the part of a stored matrix that begins at `row` and `col`, in stored form.

    Codec `int` stays what it is: the part has the same codes and steps. So does `dense`.

    Args:
        encoded: The matrix.
        dense: The part, dense.
        row: First row.
        col: First column.
    """
    spec = encoded.spec
    if tuple(dense.shape) == spec.shape:
        return _owned(encoded)
    if spec.codec != "int":
        return pack(dense, "dense" if spec.codec == "dense" else "auto")
    assert spec.coding is not None
    rows, cols = dense.shape
    codes = kernels.integer.codes_of(encoded).reshape(spec.shape)
    part = codes[row : row + rows, col : col + cols]
    steps, high = _steps_between(steps_of(encoded), spec.coding.step_block[0], row, rows)
    steps, wide = _steps_between(steps.T, spec.coding.step_block[1], col, cols)
    return kernels.integer.encode(part, steps.T, spec.dtype, block=(high, wide))


def _steps_between(steps: np.ndarray, block: int, start: int, count: int) -> tuple[np.ndarray, int]:
    """Return the steps of `count` rows from `start` on, and how many rows share one."""
    if len(steps) == 1 or start // block == (start + count - 1) // block:
        return steps[start // block if len(steps) > 1 else 0 :][:1], count
    if start % block == 0:
        return steps[start // block : -(-(start + count) // block)], block
    return steps[np.arange(start, start + count) // block], 1


def _place(loaded: torch.Tensor, base: torch.Tensor, stored: Stored) -> tuple[int, int] | None:
    """Return where in the stored matrix `loaded` begins; None when it is no part of it."""
    if (
        loaded.ndim != 2
        or base.ndim != 2
        or base._version != stored.version
        or loaded.dtype != base.dtype
        or torch_dtype(stored.encoded.spec.dtype) != base.dtype
        or tuple(base.shape) != stored.encoded.spec.shape
        or loaded.stride() != base.stride()
        or not loaded.numel()
    ):
        return None
    row, col = divmod(int(loaded.storage_offset() - base.storage_offset()), base.shape[1])
    if row < 0 or row + loaded.shape[0] > base.shape[0] or col + loaded.shape[1] > base.shape[1]:
        return None
    return row, col


def _owned(encoded: Encoded) -> Encoded:
    """Return `encoded` whose arrays are views of no tensor that is about to change."""
    if encoded.spec.codec != "dense":
        return encoded
    return Encoded(encoded.spec, {"": encoded.arrays[""].copy()})
