"""Host memory that O_DIRECT can read into."""

import contextlib
import mmap

import numpy as np

from endor.errors import ShapeError
from endor.storage.layout import ALIGN, align_up

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
