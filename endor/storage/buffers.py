"""Host memory that O_DIRECT can read into."""

import contextlib
import mmap

import numpy as np

from endor.errors import ShapeError
from endor.storage.layout import ALIGN, Record, align_up

_HUGE_PAGE = 2 << 20


class HostBuffer:
    """Page-aligned anonymous memory; freed when the last array over it is gone.

    Attributes:
        array: u8, flat, `nbytes` long. Slices of it at multiples of 4096 are aligned too, so one
            buffer can serve many records.
        nbytes: What was asked for.
    """

    __slots__ = ("array", "nbytes")

    def __init__(self, nbytes: int) -> None:
        if nbytes < 0:
            raise ShapeError(f"a buffer must have at least 0 bytes, got {nbytes}")
        self.nbytes = nbytes
        size = max(align_up(nbytes, ALIGN), ALIGN)
        memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if size >= _HUGE_PAGE and hasattr(mmap, "MADV_HUGEPAGE"):
            with contextlib.suppress(OSError):  # a kernel without huge pages says EINVAL
                memory.madvise(mmap.MADV_HUGEPAGE)
        self.array: np.ndarray = np.frombuffer(memory, dtype=np.uint8)[:nbytes]

    @property
    def address(self) -> int:
        """Address of the first byte, a multiple of 4096."""
        return int(self.array.ctypes.data)


def destination(buffer: HostBuffer | np.ndarray, needed: int, record: Record) -> np.ndarray:
    """Return the `needed` bytes at the beginning of a buffer that a record may be read into.

    Raises:
        ShapeError: It is too small, or not memory that O_DIRECT takes.
    """
    array = buffer.array if isinstance(buffer, HostBuffer) else buffer
    if (
        array.dtype != np.uint8
        or array.ndim != 1
        or array.size < needed
        or not array.flags.c_contiguous
        or not array.flags.writeable
        or array.ctypes.data % ALIGN
    ):
        raise ShapeError(
            f"record {record.name!r}: buffer must be flat writable u8 of at least {needed} bytes "
            f"at an address that {ALIGN} divides, got {array.dtype} {array.shape} at "
            f"{array.ctypes.data:#x}; HostBuffer makes such memory"
        )
    return array[:needed]
