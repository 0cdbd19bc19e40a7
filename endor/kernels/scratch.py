"""Buffers that successive `encode` calls share."""

import math

import numpy as np


class Scratch:
    """Memory for the arrays of one encoded tensor at a time.

    Fresh memory costs a page fault per page, which at memory speed is most of the time that packing
    takes; a converter that writes one tensor before it packs the next gives `encode` the same
    scratch each time. Not for two threads at once.
    """

    def __init__(self) -> None:
        self._buffers: dict[str, np.ndarray] = {}

    def take(
        self, name: str, shape: tuple[int, ...], dtype: np.dtype[np.unsignedinteger]
    ) -> np.ndarray:
        """Return an array of `shape` whose content is arbitrary; the last one so called is lost."""
        nbytes = math.prod(shape) * dtype.itemsize
        buffer = self._buffers.get(name)
        if buffer is None or buffer.nbytes < nbytes:
            self._buffers.pop(name, None)
            buffer = self._buffers[name] = np.empty(nbytes, dtype=np.uint8)
        return buffer[:nbytes].view(dtype).reshape(shape)

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(buffer.nbytes for buffer in self._buffers.values())
