"""Blocks of a record that stay in memory, each in its own place, while the others are on disk.

Of a matrix that is stored by neuron, blocks in which busy neurons lie are worth their memory: those
of its record that active neurons are most likely to need, by the counts of a calibration. They are
kept; others that were read stay until their memory is needed.

    record    | 0 | 1 | 2 | 3 | 4 | 5 | ...
    mapping   | k |   |   | k | r |   | ...   k kept, r read not long ago; others take no memory
"""

import contextlib
import mmap
from collections import OrderedDict

import numpy as np

from endor.planning.units import Unit
from endor.storage.layout import ALIGN

PAGE = max(1, mmap.PAGESIZE // ALIGN)
"""Blocks that the system gives memory to, or takes it from, at once."""

_NO_RESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)


class Blocks:
    """The blocks of one record.

    Args:
        unit: Its unit.

    Attributes:
        array: u8, as long as the record; what is not there reads as 0.
        there: Whether each block is in memory, bool `(blocks,)`.
        kept: Whether it stays.
    """

    def __init__(self, unit: Unit) -> None:
        # No memory is set aside: a mapping is as long as its record, and holds a part of it.
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NO_RESERVE
        self._memory = mmap.mmap(-1, unit.nbytes, flags=flags)
        if hasattr(mmap, "MADV_NOHUGEPAGE"):  # or one block could take the memory of 512
            with contextlib.suppress(OSError):  # a kernel without huge pages says EINVAL
                self._memory.madvise(mmap.MADV_NOHUGEPAGE)
        self.array: np.ndarray = np.frombuffer(self._memory, dtype=np.uint8)
        count = unit.nbytes // ALIGN
        self.there = np.zeros(count, dtype=bool)
        self.kept = np.zeros(count, dtype=bool)

    @property
    def loose(self) -> int:
        """Blocks that are in memory and need not stay."""
        return int(np.count_nonzero(self.there & ~self.kept))

    def keep(self, data: np.ndarray, kept: np.ndarray) -> None:
        """Keep the blocks `kept` of a record that is in memory, u8 `data`."""
        self.kept = kept
        for first, last in runs(kept):
            self.array[first * ALIGN : last * ALIGN] = data[first * ALIGN : last * ALIGN]
        self.there |= kept

    def drop(self, which: np.ndarray) -> None:
        """Give up blocks, whatever they are, and their memory; bool `(blocks,)`."""
        if not which.any():
            return
        # what is not there may go along: one call for many runs
        for first, last in runs(which | ~self.there):
            self._memory.madvise(mmap.MADV_DONTNEED, first * ALIGN, (last - first) * ALIGN)
        self.there &= ~which
        self.kept = self.kept & ~which


class BlockMemory:
    """The blocks of all matrices of a mover that are read by neuron; guarded by its lock.

    Args:
        loose_bytes: Memory for blocks that need not stay; the largest record at least.

    Attributes:
        kept_bytes: Memory of those that stay.
    """

    def __init__(self, loose_bytes: int) -> None:
        self.kept_bytes = 0
        self._limit = loose_bytes // ALIGN
        self._used: OrderedDict[str, Blocks] = OrderedDict()
        self._loose = 0

    @property
    def nbytes(self) -> int:
        """Memory that blocks take, or may."""
        return self.kept_bytes + self._limit * ALIGN

    def add(self, unit: Unit, data: np.ndarray, kept: np.ndarray) -> Blocks:
        """Return the blocks of a unit that is in memory, u8 `data`, of which `kept` stay."""
        self.remove(unit.name)
        blocks = Blocks(unit)
        blocks.keep(data, kept)
        self.kept_bytes += int(np.count_nonzero(kept)) * ALIGN
        self._used[unit.name] = blocks
        return blocks

    def remove(self, name: str) -> None:
        """Forget a unit."""
        blocks = self._used.pop(name, None)
        if blocks is not None:
            self._loose -= blocks.loose
            self.kept_bytes -= int(np.count_nonzero(blocks.kept)) * ALIGN

    def make_room(self, name: str, read: np.ndarray, needed: np.ndarray) -> None:
        """See that blocks may be read: others give way, those used longest ago first.

        Args:
            name: Their unit.
            read: Which will be read, bool `(blocks,)`.
            needed: Those of the unit that must stay now.
        """
        mine = self._used[name]
        new = int(np.count_nonzero(read & ~mine.there))
        self._used.move_to_end(name)
        for other in self._used.values():
            if self._loose + new <= self._limit:
                return
            loose = other.there & ~other.kept
            if other is mine:
                loose &= ~whole_pages(needed | read)
            self._loose -= int(np.count_nonzero(loose))
            other.drop(loose)

    def note_read(self, name: str, read: np.ndarray) -> None:
        """Note that blocks of a unit were read, bool `(blocks,)`."""
        blocks = self._used[name]
        self._loose += int(np.count_nonzero(read & ~blocks.there))
        blocks.there |= read

    def spoil(self, name: str, read: np.ndarray) -> None:
        """Give up blocks of a unit whose read failed: nobody knows what they hold."""
        blocks = self._used[name]
        self._loose -= blocks.loose
        self.kept_bytes -= int(np.count_nonzero(blocks.kept & read)) * ALIGN
        blocks.drop(read)
        self._loose += blocks.loose


def whole_pages(blocks: np.ndarray) -> np.ndarray:
    """Return `blocks`, bool, with all others of each page of memory that holds one."""
    if PAGE == 1:
        return blocks
    padded = np.zeros(-(-len(blocks) // PAGE) * PAGE, dtype=bool)
    padded[: len(blocks)] = blocks
    return np.repeat(padded.reshape(-1, PAGE).any(axis=1), PAGE)[: len(blocks)]


def busiest(chances: np.ndarray, nbytes: int) -> np.ndarray:
    """Return which blocks to keep in `nbytes`: those most likely to be needed, bool.

    Args:
        chances: How likely each block is to be needed in a step; those that never are stay out.
        nbytes: Memory for them.
    """
    pages = -(-len(chances) // PAGE)
    padded = np.zeros(pages * PAGE)
    padded[: len(chances)] = chances
    worth = padded.reshape(pages, PAGE).sum(axis=1)
    order = np.argsort(-worth, kind="stable")[: nbytes // (PAGE * ALIGN)]
    kept = np.zeros(pages, dtype=bool)
    kept[order] = worth[order] > 0
    return np.repeat(kept, PAGE)[: len(chances)]


def runs(blocks: np.ndarray) -> list[tuple[int, int]]:
    """Return `(first, one past the last)` of each run of true values."""
    edges = np.flatnonzero(np.diff(np.r_[False, blocks, False]))
    return list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))
