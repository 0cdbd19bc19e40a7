"""One buffer that the parts of all matrices pass through, where none would stay to its next use.

Memory that was used before takes a disk's bytes faster than fresh pages, which the system must
find and clear first: 900 requests of 16 KB took 14 ms into such a buffer, 23 into fresh pages.
"""

import numpy as np

from endor.offload.neuron_blocks import BlockMemory, Blocks
from endor.planning.units import Unit
from endor.storage import HostBuffer
from endor.storage.layout import ALIGN

READ_SHARE = 0.15
"""Of a record that a step reads in parts, about."""


def pass_through(units_bytes: int, room_bytes: int) -> bool:
    """Whether what a step reads of all matrices is more than there is room for.

    Blocks are used in a circle then: those used longest ago, which give way, are needed next.
    """
    return READ_SHARE * units_bytes > room_bytes


class _Passing(Blocks):
    """The blocks of one record, in a buffer that others use as well."""

    def __init__(self, unit: Unit, array: np.ndarray) -> None:
        self.array = array[: unit.nbytes]
        count = unit.nbytes // ALIGN
        self.there = np.zeros(count, dtype=bool)
        self.kept = np.zeros(count, dtype=bool)

    def drop(self, which: np.ndarray) -> None:
        self.there &= ~which


class PassingMemory(BlockMemory):
    """A buffer for parts of any matrix; guarded by its mover's lock.

    Args:
        nbytes: The largest record.
    """

    def __init__(self, nbytes: int) -> None:
        super().__init__(nbytes)
        self._buffer = HostBuffer(nbytes)

    def add(self, unit: Unit, data: np.ndarray, kept: np.ndarray) -> Blocks:
        assert not kept.any()
        blocks = self._used[unit.name] = _Passing(unit, self._buffer.array)
        return blocks

    def remove(self, name: str) -> None:
        self._used.pop(name, None)

    def make_room(self, name: str, read: np.ndarray, needed: np.ndarray) -> None:
        if not read.any():
            return
        for other, blocks in self._used.items():
            if other != name:
                blocks.there[:] = False

    def note_read(self, name: str, read: np.ndarray) -> None:
        self._used[name].there |= read

    def spoil(self, name: str, read: np.ndarray) -> None:
        self._used[name].drop(read)
