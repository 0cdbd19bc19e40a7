"""Counting and cutting 16-bit magnitudes: what exact magnitude pruning is made of."""

import numpy as np

from endor.errors import ShapeError
from endor.kernels import native
from endor.kernels.dispatch import select

CHUNK = 1 << 16
"""Elements that the numpy path looks at together: they stay in the cache."""


def count16(bits: np.ndarray, mask: int, *, kernel: str | None = None) -> np.ndarray:
    """Return how many elements of `bits` have each value under `mask`, int64 `(32768,)`.

    Args:
        bits: uint16, flat, contiguous.
        mask: Bits of an element that count, at most 0x7FFF.

    Raises:
        ShapeError: `bits` is something else.
        BackendError: The forced kernel, or `mask`, cannot be used here.
    """
    _check(bits)
    counts = np.zeros(1 << 15, dtype=np.int64)
    if select(kernel) is None:
        for start in range(0, bits.size, CHUNK):
            found = np.bincount(bits[start : start + CHUNK] & np.uint16(mask))
            counts[: found.size] += found
    else:
        library = native.library()
        native.check(library.endor_count16(bits.ctypes.data, bits.size, mask, counts.ctypes.data))
    return counts


def zero_below16(
    bits: np.ndarray, mask: int, threshold: int, ties: int, *, kernel: str | None = None
) -> None:
    """Zero, in place, the elements below `threshold` and the first `ties` of those equal to it.

    Args:
        bits: uint16, flat, contiguous, writable.
        mask: Bits of an element that are compared, at most 0x7FFF.
        threshold: Compared with them, at most 0x7FFF.
        ties: How many equal elements go as well.

    Raises:
        ShapeError: `bits` is something else.
        BackendError: The forced kernel, or `mask`, cannot be used here.
    """
    _check(bits)
    if select(kernel) is not None:
        library = native.library()
        status = library.endor_zero_below16(bits.ctypes.data, bits.size, mask, threshold, ties)
        native.check(status)
        return
    for start in range(0, bits.size, CHUNK):
        part = bits[start : start + CHUNK]
        sizes = part & np.uint16(mask)
        if ties:
            tied = np.flatnonzero(sizes == threshold)[:ties]
            ties -= tied.size
            part[tied] = 0
        part *= (sizes >= threshold).view(np.uint8)


def _check(bits: np.ndarray) -> None:
    if bits.dtype != np.uint16 or bits.ndim != 1 or not bits.flags.c_contiguous:
        raise ShapeError(f"elements must be flat, contiguous uint16, got {bits.dtype} {bits.shape}")
