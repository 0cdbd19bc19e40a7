"""Dense memory that weights are expanded into, one at a time."""

from collections.abc import Iterable, Sequence

import torch

from endor.codecs import DType
from endor.dtypes import torch_dtype
from endor.errors import DTypeError
from endor.planning.units import WeightSpec, stored_dtype
from endor.storage import FileLayout

VIEW_ALIGN = 64
"""Where the converted matrix begins in a scratch buffer, behind the stored one."""


def scratch_bytes(
    layouts: Sequence[FileLayout], specs: Iterable[tuple[WeightSpec, torch.dtype]]
) -> int:
    """Return the scratch that the largest weight needs.

    Raises:
        DTypeError: Stored elements are integers, which no linear layer multiplies by.
    """
    largest = 0
    for spec, dtype in specs:
        item = stored_dtype(layouts, spec)
        if not item.signed or item.exponent_bits == 0:
            raise DTypeError(
                f"{spec.name}: stored as {item.name}; weights must be floating point to be run"
            )
        largest = max(largest, _scratch_of(torch.Size(spec.shape).numel(), item, dtype))
    return largest


def align_view(nbytes: int) -> int:
    """Return where the converted matrix begins behind `nbytes` of stored elements."""
    return -(-nbytes // VIEW_ALIGN) * VIEW_ALIGN


def _scratch_of(numel: int, item: DType, dtype: torch.dtype) -> int:
    """Return the scratch that a weight needs: stored elements, and beside them converted ones."""
    stored = numel * item.itemsize
    if torch_dtype(item) == dtype:
        return stored
    return align_view(stored) + numel * dtype.itemsize
