"""Tensors laid out as a record lays them out, and destinations that notice what is wrong."""

from collections.abc import Sequence

import numpy as np
import pytest

from endor.codecs import Encoded
from endor.kernels.gpu_plan import READ_AHEAD

CANARY = 0xA5


class Record:
    """Tensors in one piece of memory, arrays at multiples of 256, poison between them."""

    def __init__(self, tensors: Sequence[Encoded], *, gap: int = 0) -> None:
        places, end = [], 0
        for encoded in tensors:
            for suffix, array in encoded.arrays.items():
                places.append((encoded, suffix, array, end))
                end += -(-array.nbytes // 256) * 256 + gap
        self.memory = np.full(end + READ_AHEAD + 256, 0xEE, dtype=np.uint8)
        start = -self.memory.ctypes.data % 256
        self.begin = self.memory.ctypes.data + start
        self.end = self.begin + end + READ_AHEAD
        self.region = self.begin, self.memory[start : start + end + READ_AHEAD]
        self.addresses: list[dict[str, int]] = [{} for _ in tensors]
        order = {id(encoded): i for i, encoded in enumerate(tensors)}
        for encoded, suffix, array, at in places:
            flat = array.reshape(-1).view(np.uint8)
            self.memory[start + at : start + at + flat.size] = flat
            self.addresses[order[id(encoded)]][suffix] = self.begin + at


class Output:
    """A poisoned destination at a multiple of `align` bytes, between canaries."""

    def __init__(self, count: int, uint: np.dtype, *, align: int = 16) -> None:
        self._bytes = np.full(count * uint.itemsize + 2 * align + 256, CANARY, dtype=np.uint8)
        self._start = -self._bytes.ctypes.data % align + max(align, 64)
        self.address = self._bytes.ctypes.data + self._start
        self._stop = self._start + count * uint.itemsize
        self.array = self._bytes[self._start : self._stop].view(uint)
        self.region = self.address, self._bytes[self._start : self._stop]

    def check(self, expected: np.ndarray) -> None:
        """Fail at the first element that differs, or at a write outside."""
        wrong = np.flatnonzero(self.array != expected.reshape(-1))
        if wrong.size:
            at = int(wrong[0])
            pytest.fail(
                f"{wrong.size} of {self.array.size} elements differ, the first at {at}: "
                f"{self.array[at]:#x} instead of {expected.reshape(-1)[at]:#x}"
            )
        self.check_canaries()

    def check_canaries(self) -> None:
        assert (self._bytes[: self._start] == CANARY).all(), "wrote before the output"
        assert (self._bytes[self._stop :] == CANARY).all(), "wrote past the output"
