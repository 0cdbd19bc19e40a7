"""Tasks that anyone may do, the memory that records pass through, and what is known of a layer."""

import threading
from collections import deque
from collections.abc import Callable
from typing import Any

import torch

from endor.errors import BackendError, EndorError
from endor.offload.device import Device
from endor.offload.kv.media import FileMedium, RamMedium
from endor.storage import HostBuffer


class Task:
    """Work that is done once, by whoever comes first."""

    __slots__ = ("_claim", "_done", "_work", "error")

    def __init__(self, work: Callable[[], None]) -> None:
        self._work: Callable[[], None] | None = work
        self._claim = threading.Lock()
        self._done = threading.Event()
        self.error: EndorError | None = None

    def run(self) -> None:
        """Do the work unless somebody does; errors are kept for `finish`."""
        if not self._claim.acquire(blocking=False):
            return
        assert self._work is not None
        try:
            self._work()
        except EndorError as error:
            self.error = error
        except BaseException as error:  # whatever it is, the model must not wait for ever
            self.error = BackendError(f"keys and values could not be moved: {error!r}")
            self.error.__cause__ = error
        finally:
            self._work = None
            self._done.set()

    def finish(self) -> None:
        """Return when the work is done; raise what made it fail."""
        self.run()
        self._done.wait()
        if self.error is not None:
            raise self.error

    @property
    def done(self) -> bool:
        return self._done.is_set()

    def settle(self) -> bool:
        """Return when the work is over or will never begin: whether it was done."""
        if self._claim.acquire(blocking=False):
            self._work = None
            self._done.set()
            return False
        self._done.wait()
        return self.error is None


class Slot:
    """Memory that a layer's records pass through: on the device, on the host for a file, or both.

    `granted` is recorded where the model computes, behind the slot's last use; `ready` behind the
    copy into it.
    """

    def __init__(self, device: Device | None) -> None:
        self.device = device
        self.layer: Layer | None = None
        self.task: Task | None = None
        self.host: HostBuffer | None = None
        self.buffer: torch.Tensor | None = None
        self.granted = device.event() if device is not None else None
        self.ready = device.event() if device is not None else None

    def reserve(self, nbytes: int, *, host: bool) -> None:
        """See that there is room, and a little more for the next tokens; on the model's thread."""
        if self.device is not None:
            if self.buffer is None or self.buffer.numel() < nbytes:
                self.device.synchronize(self.ready)
                self.buffer = None
                self.buffer = self.device.allocate(nbytes + nbytes // 8)
            self.device.record_compute(self.granted)
        if host and (self.host is None or self.host.nbytes < nbytes):
            self.unpin()
            self.host = HostBuffer(nbytes + nbytes // 8)
            if self.device is not None:
                self.device.pin(self.host.array)

    def unpin(self) -> None:
        """Let go of the host memory."""
        if self.host is not None and self.device is not None:
            self.device.synchronize(self.ready)
            self.device.unpin(self.host.array)
        self.host = None


class Layer:
    """Records of one layer.

    Attributes:
        index: Number of the layer.
        medium: Where saved records are; None before the first.
        tokens: Records in all.
        saved: Of these, at medium.
        pending: The others, as (records, when they were made on the device).
        lock: Guards medium, `saved` and `pending`.
        slot: Where a load is or was put, until it is used.
        copied: Recorded behind copies from the home's memory.
    """

    def __init__(self, index: int, device: Device | None) -> None:
        self.index = index
        self.medium: RamMedium | FileMedium | None = None
        self.tokens = 0
        self.saved = 0
        self.pending: deque[tuple[torch.Tensor, Any]] = deque()
        self.lock = threading.Lock()
        self.slot: Slot | None = None
        self.copied = device.event() if device is not None else None
