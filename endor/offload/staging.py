"""The staging area: host memory that reads pass through, cut into ranges."""

from dataclasses import dataclass

import numpy as np

from endor.storage import ALIGN, HostBuffer


@dataclass(frozen=True, slots=True)
class Range:
    """A stretch of a host buffer that holds one record.

    Attributes:
        start: First byte in the buffer.
        stop: First byte after it.
        array: u8 view of the record, which begins the stretch and may be shorter.
    """

    start: int
    stop: int
    array: np.ndarray


class Staging:
    """A host buffer cut into ranges of any size, first fit.

    Fixed slots would all have the size of the largest unit, often a language model's head and ten
    times the others; ranges let many small units be read ahead in the same memory.
    """

    __slots__ = ("_buffer", "_free", "nbytes")

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self._buffer = HostBuffer(nbytes) if nbytes else None
        # Records have whole pages; a part of one at the end would spoil what is cut from there.
        usable = nbytes // ALIGN * ALIGN
        self._free: list[tuple[int, int]] = [(0, usable)] if usable else []

    @property
    def buffer(self) -> HostBuffer | None:
        """The memory that is cut up."""
        return self._buffer

    @property
    def free_bytes(self) -> int:
        return sum(stop - start for start, stop in self._free)

    def take(self, nbytes: int, *, span_bytes: int = 0, top: bool = False) -> Range | None:
        """Return room for `nbytes` of the buffer, or None when no stretch is long enough.

        Args:
            nbytes: What is to be held.
            span_bytes: Take at least so much, so that a later occupant of that size fits.
            top: Look from the end of the buffer.
        """
        length = max(nbytes, span_bytes)
        for at in range(len(self._free))[:: -1 if top else 1]:
            start, stop = self._free[at]
            if stop - start < length:
                continue
            if stop - start == length:
                del self._free[at]
            elif top:
                self._free[at] = (start, stop - length)
                start = stop - length
            else:
                self._free[at] = (start + length, stop)
            assert self._buffer is not None
            return Range(start, start + length, self._buffer.array[start : start + nbytes])
        return None

    @property
    def free(self) -> tuple[tuple[int, int], ...]:
        """Stretches that are free, as (first byte, first byte after it), in order."""
        return tuple(self._free)

    def give(self, item: Range) -> None:
        """Take a range back."""
        at = 0
        while at < len(self._free) and self._free[at][0] < item.start:
            at += 1
        start, stop = item.start, item.stop
        if at < len(self._free) and self._free[at][0] == stop:
            stop = self._free.pop(at)[1]
        if at and self._free[at - 1][1] == start:
            at -= 1
            start = self._free.pop(at)[0]
        self._free.insert(at, (start, stop))
