"""Global and shared memory of a launch: ranges, alignment, races, and what accesses cost."""

from collections import Counter

import numpy as np

POISON = 0xFF
"""What shared memory holds at first: NaN to every float, so that it cannot pass for a result."""

NOBODY, SETTLED = -1, -2
"""Writers of a byte: none yet; one whose write a barrier has made visible to the block."""


class Fault(AssertionError):
    """What the hardware would refuse, leave undefined or do slowly."""


def words_of(rows: np.ndarray, modifiers: tuple[str, ...]) -> np.ndarray:
    """Return what a load of `(lanes, n)` bytes puts into registers, `(lanes, registers)`."""
    count = rows.shape[1]
    if count >= 4:
        return np.ascontiguousarray(rows).view(np.uint32)
    narrow = np.ascontiguousarray(rows).view(f"u{count}").astype(np.uint32)
    if {"S8", "S16"} & set(modifiers):
        shift = 32 - 8 * count
        narrow = ((narrow << np.uint32(shift)).view(np.int32) >> shift).view(np.uint32)
    return narrow


def bytes_of(words: np.ndarray, size: int) -> np.ndarray:
    """Return the `size` bytes of each lane that a store takes from `(lanes, registers)`."""
    return np.ascontiguousarray(words).view(np.uint8).reshape(len(words), -1)[:, :size]


class Global:
    """Arrays at device addresses. A byte of an output belongs to the warp that writes it first.

    From the next barrier of the block on it belongs to the block.

    Args:
        warps: Warps of a block; they are numbered through the grid.
    """

    def __init__(self, warps: int) -> None:
        self._warps = warps
        self._regions: list[tuple[int, np.ndarray, np.ndarray | None]] = []

    def add(self, base: int, array: np.ndarray, *, writable: bool = False) -> None:
        """Place the bytes of `array`, uint8, at `base`; without `writable` stores there fault."""
        owner = np.full(array.size, NOBODY, dtype=np.int64) if writable else None
        self._regions.append((base, array, owner))

    def barrier(self, block: int) -> None:
        """All warps of `block` have met: what they wrote is visible to all of them."""
        for _, _, owner in self._regions:
            if owner is not None:
                owner[owner // self._warps == block] = self._settled(block * self._warps)

    def _settled(self, warps: np.ndarray | int) -> np.ndarray | int:
        return SETTLED - warps // self._warps

    def _strange(self, owner: np.ndarray, warps: np.ndarray) -> bool:
        """Whether any byte belongs to others than the warp that comes to it, and its block."""
        theirs = (owner != NOBODY) & (owner != warps) & (owner != self._settled(warps))
        return bool(theirs.any())

    def read(self, at: np.ndarray, size: int, warps: np.ndarray) -> np.ndarray:
        """Return `(lanes, size)` bytes."""
        out = np.empty((at.size, size), dtype=np.uint8)
        for array, owner, lanes, index in self._find(at, size):
            out[lanes] = array[index]
            if owner is not None and self._strange(owner[index], warps[lanes, None]):
                raise Fault("a warp reads output that another one has written")
        return out

    def write(self, at: np.ndarray, data: np.ndarray, warps: np.ndarray) -> None:
        for array, owner, lanes, index in self._find(at, data.shape[1]):
            if owner is None:
                raise Fault(f"a store into an input, at {int(at[lanes][0]):#x}")
            by = np.broadcast_to(warps[lanes, None], index.shape)
            if self._strange(owner[index], by):
                raise Fault("two warps write the same output")
            owner[index] = by
            if (owner[index] != by).any():
                raise Fault("two warps write the same output")
            array[index] = data[lanes]
            if (array[index] != data[lanes]).any():
                raise Fault("two lanes write different bytes to the same place")

    def _find(self, at: np.ndarray, size: int):
        if (at % np.uint64(size)).any():
            raise Fault(f"a misaligned access of {size} bytes")
        left = np.ones(at.size, dtype=bool)
        for base, array, owner in self._regions:
            inside = (at >= np.uint64(base)) & (
                at + np.uint64(size) <= np.uint64(base + array.size)
            )
            if inside.any():
                left &= ~inside
                begin = (at[inside] - np.uint64(base)).astype(np.int64)
                yield array, owner, inside, begin[:, None] + np.arange(size)
        if left.any():
            raise Fault(f"an access outside the arrays: {size} bytes at {int(at[left][0]):#x}")


class Shared:
    """Dynamic shared memory of several blocks.

    Between two barriers a byte may be written by one warp, and then read by no other; that the
    lanes of a warp order their own accesses is the emulator's to prove: here they run together.

    Args:
        size: Bytes of a block.
        base: Address of the first one.
        unwritten: Whether a kernel may read what nobody wrote, as long as it does not use it.
    """

    def __init__(self, blocks: int, warps: int, size: int, base: int, *, unwritten: bool) -> None:
        self._size, self._base, self._unwritten = size, base, unwritten
        self._bytes = np.full(blocks * size, POISON, dtype=np.uint8)
        self._writer = np.full(blocks * size, NOBODY, dtype=np.int16)
        self._read = np.zeros((warps, blocks * size), dtype=bool)

    def barrier(self, block: int) -> None:
        """All warps of `block` have met: what was written is visible, what was read is done."""
        span = slice(block * self._size, (block + 1) * self._size)
        writer = self._writer[span]
        writer[writer >= 0] = SETTLED
        self._read[:, span] = False

    def place(self, at: np.ndarray, size: int, blocks: np.ndarray) -> np.ndarray:
        """Return the indices of `(lanes, size)` bytes, after checking them."""
        offset = at.astype(np.int64) - self._base
        if (offset % size).any():
            raise Fault(f"a misaligned access of {size} bytes in shared memory")
        if (offset < 0).any() or (offset + size > self._size).any():
            wrong = offset[(offset < 0) | (offset + size > self._size)][0]
            raise Fault(f"byte {wrong} of {self._size} of shared memory")
        return (blocks * self._size + offset)[:, None] + np.arange(size)

    def read(self, index: np.ndarray, warps: np.ndarray) -> np.ndarray:
        writer = self._writer[index]
        if ((writer >= 0) & (writer != warps[:, None])).any():
            raise Fault("a warp reads shared memory that another one has just written")
        if not self._unwritten and (writer == NOBODY).any():
            raise Fault("a read of shared memory that nobody has written")
        self._read[warps[:, None], index] = True
        return self._bytes[index]

    def write(self, index: np.ndarray, data: np.ndarray, warps: np.ndarray) -> None:
        self._claim(index, warps)
        self._bytes[index] = data
        if (self._bytes[index] != data).any():
            raise Fault("two lanes write different bytes to the same place in shared memory")

    def spoil(self, index: np.ndarray, warps: np.ndarray) -> None:
        """A copy is on its way to these bytes: until it is waited for they hold nothing."""
        self._claim(index, warps)
        self._bytes[index] = POISON
        self._writer[index] = NOBODY

    def _claim(self, index: np.ndarray, warps: np.ndarray) -> None:
        writer, by = self._writer[index], np.broadcast_to(warps[:, None], index.shape)
        if ((writer >= 0) & (writer != by)).any():
            raise Fault("two warps write the same shared memory")
        readers = self._read[:, index].sum(0) - self._read[by, index]
        if readers.any():
            raise Fault("a warp overwrites shared memory that another one has just read")
        self._writer[index] = by
        if (self._writer[index] != by).any():
            raise Fault("two warps write the same shared memory")


class Costs(Counter):
    """Warp instructions by opcode, and what their accesses cost.

    `sectors read`, `sectors written`: 32-byte sectors of global memory. `lines`: 128-byte lines
    that accesses touch. `wavefronts`: cycles of shared memory, conflicts of banks counted; 64-bit
    accesses go by half warps, 128-bit ones by quarters.
    """

    @property
    def instructions(self) -> int:
        return sum(count for name, count in self.items() if name.isupper())

    @property
    def transfers(self) -> int:
        """What passes the unit for memory and shuffles, in its cycles."""
        return self["lines"] + self["wavefronts"] + self["SHFL"] + self["REDUX"]

    def global_access(self, kind: str, at: np.ndarray, warps: np.ndarray) -> None:
        high = warps.astype(np.uint64) << np.uint64(44)
        self[f"sectors {kind}"] += np.unique(high | at >> np.uint64(5)).size
        self["lines"] += np.unique(high | at >> np.uint64(7)).size

    def shared_access(
        self, at: np.ndarray, size: int, warps: np.ndarray, lanes: np.ndarray
    ) -> None:
        group = warps * 4 + lanes // {8: 16, 16: 8}.get(size, 32)
        words = (at.astype(np.int64) // 4)[:, None] + np.arange(max(size // 4, 1))
        single = np.unique(group[:, None] << 32 | words)
        banks = (single >> 32) * 32 + single % 32
        counts = np.bincount(banks, minlength=(int(group.max()) + 1) * 32)
        self["wavefronts"] += int(counts.reshape(-1, 32).max(1).sum())
