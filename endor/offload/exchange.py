"""Activations from a device to the host, and results back, through page-locked memory.

    the caller's stream:  ... inputs . copy down . record ............ copy up . record . use
    the caller's thread:                          wait . multiply . ...

Only the copy of the inputs is waited for: what was enqueued behind it, and the copies of weights on
their own stream, go on. Products of one input follow each other (queries, keys and values; gate and
up), so the last input is remembered, and goes down once.
"""

import threading
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from endor.errors import BackendError
from endor.offload.device import Device
from endor.storage import HostBuffer

RESULTS = 4
"""Buffers of results that a thread uses in turn: one is written while the last ones go up."""


@dataclass(eq=False, slots=True)
class _Pinned:
    """Page-locked memory, and the event behind the last copy that used it."""

    buffer: HostBuffer
    event: Any
    locked: bool


@dataclass(eq=False, slots=True)
class _Lane:
    """The memory of one thread."""

    down: _Pinned | None = None
    up: list[_Pinned | None] = field(default_factory=lambda: [None] * RESULTS)
    turn: int = 0
    sent: torch.Tensor | None = None
    key: tuple[Hashable, ...] = ()
    arrived: bool = False


class Exchange:
    """Brings inputs to the host and products to the device.

    Each thread has memory of its own, as large as its largest use. Page-locking may be refused:
    copies are then slower, and right all the same.

    Args:
        device: Where the inputs are, and the results go.

    Attributes:
        trips: Inputs that were sent.
    """

    def __init__(self, device: Device) -> None:
        self._device = device
        self._local = threading.local()
        self._lock = threading.Lock()
        self._made: list[_Pinned] = []
        self._closed = False
        self.trips = 0

    @property
    def nbytes(self) -> int:
        """Host memory in use."""
        with self._lock:
            return sum(pinned.buffer.nbytes for pinned in self._made)

    def send(self, inputs: torch.Tensor) -> None:
        """Enqueue the copy of `inputs` to the host, unless it was the last thing sent.

        Args:
            inputs: On the device, contiguous. Kept until the next one, so that its memory is its
                own; one that was written since is sent again.

        Raises:
            BackendError: The exchange is closed.
        """
        lane, device = self._lane(), self._device
        key = _key(inputs, device.compute_stream())
        if key and key == lane.key:
            return
        nbytes = inputs.numel() * inputs.element_size()
        lane.key, lane.sent = (), None
        down = lane.down = self._fit(lane.down, nbytes)
        with device.current():
            device.copy_down(down.buffer.array[:nbytes], inputs.view(-1).view(torch.uint8))
        device.record_compute(down.event)
        lane.sent, lane.key, lane.arrived = inputs, key, False
        self.trips += 1

    def arrived(self) -> np.ndarray:
        """Wait for what this thread sent last, and return its bytes: valid until its next `send`.

        A failed copy is raised here, and the next `send` copies again.
        """
        lane = self._lane()
        assert lane.sent is not None
        assert lane.down is not None
        if not lane.arrived:
            try:
                self._device.synchronize(lane.down.event)
            except BaseException:
                lane.key, lane.sent = (), None
                raise
            lane.arrived = True
        return lane.down.buffer.array[: lane.sent.numel() * lane.sent.element_size()]

    def result(self, batch: int, rows: int) -> np.ndarray:
        """Return host memory for a product, float32 `(batch, rows)`, to be given to `receive`."""
        lane, nbytes = self._lane(), 4 * batch * rows
        lane.turn = (lane.turn + 1) % RESULTS
        place = lane.up[lane.turn]
        if place is not None:
            self._device.synchronize(place.event)  # the copy that used it last
        place = lane.up[lane.turn] = self._fit(place, nbytes)
        return place.buffer.array[:nbytes].view(np.float32).reshape(batch, rows)

    def receive(self, out: torch.Tensor, result: np.ndarray) -> None:
        """Enqueue the copy of the last `result` into `out`, contiguous, on the caller's stream."""
        lane = self._lane()
        place = lane.up[lane.turn]
        assert place is not None
        with self._device.current():
            flat = result.reshape(-1).view(np.uint8)
            self._device.copy_up(out.view(-1).view(torch.uint8), flat)
        self._device.record_compute(place.event)

    def close(self) -> None:
        """Unlock the memory; nothing may be copied any more. May be called twice."""
        with self._lock:
            self._closed = True
            while self._made:
                self._release(self._made.pop())
        self._local = threading.local()

    def _lane(self) -> _Lane:
        if self._closed:
            raise BackendError("the weights of this model were closed; load it again")
        lane: _Lane | None = getattr(self._local, "lane", None)
        if lane is None:
            lane = self._local.lane = _Lane()
        return lane

    def _fit(self, place: _Pinned | None, nbytes: int) -> _Pinned:
        """Return `place`, or a larger one in its stead."""
        if place is not None:
            if place.buffer.nbytes >= nbytes:
                return place
            self._device.synchronize(place.event)
        buffer = HostBuffer(max(nbytes, 1))
        with self._lock:
            if self._closed:
                raise BackendError("the weights of this model were closed; load it again")
            if place is not None:
                self._made.remove(place)
                self._release(place)
            locked = self._device.pin(buffer.array) is None
            made = _Pinned(buffer, self._device.event(), locked)
            self._made.append(made)
        return made

    def _release(self, place: _Pinned) -> None:
        if place.locked:
            self._device.unpin(place.buffer.array)


def _key(inputs: torch.Tensor, stream: Hashable) -> tuple[Hashable, ...]:
    """Return what tells this content of `inputs` from another; empty where nothing does."""
    if inputs.is_inference():  # counts no versions: a write would go unnoticed
        return ()
    where = (inputs.data_ptr(), tuple(inputs.shape), inputs.dtype, inputs._version)
    return (*where, stream)
