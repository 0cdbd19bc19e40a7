"""Page-locked host memory: what the copy engine reads while the processor does something else."""

import warnings
from collections.abc import Iterable

import numpy as np

from endor.offload.device import Device
from endor.storage import HostBuffer

CHUNK_BYTES = 1 << 30
"""Memory that is page-locked at a time: a limit then refuses the rest, not everything."""


class PinnedArena:
    """Host buffers, page-locked for a device as far as the system lets it.

    Page-locking pages that exist costs no memory, where `torch.Tensor.pin_memory` copies and rounds
    each block up to a power of two. What is refused stays pageable: copies from it work, slower
    and with the processor's help.

    Args:
        device: Whose copies read the buffers.
        buffers: Kept alive until `close`.

    Attributes:
        pinned_bytes: Bytes that are page-locked.
        pageable_bytes: Bytes that are not.
        reason: Why, when some are not.
    """

    def __init__(self, device: Device, buffers: Iterable[HostBuffer]) -> None:
        self._device = device
        self._pinned: list[np.ndarray] = []
        self.pinned_bytes = 0
        self.pageable_bytes = 0
        self.reason: str | None = None
        for buffer in buffers:
            for start in range(0, buffer.nbytes, CHUNK_BYTES):
                chunk = buffer.array[start : start + CHUNK_BYTES]
                if self.reason is None:
                    self.reason = device.pin(chunk)
                if self.reason is None:
                    self._pinned.append(chunk)
                    self.pinned_bytes += chunk.nbytes
                else:
                    self.pageable_bytes += chunk.nbytes
        if self.reason is not None:
            warnings.warn(
                f"{self.pageable_bytes} bytes of packed weights could not be page-locked "
                f"({self.reason}): copies from them will be slow. Raise the limit of locked memory "
                "(ulimit -l), or give fewer bytes of ram",
                RuntimeWarning,
                stacklevel=2,
            )

    def close(self) -> None:
        """Unlock everything; nothing may be copying from it. May be called twice."""
        while self._pinned:
            self._device.unpin(self._pinned.pop())
        self.pinned_bytes = 0
