"""A device whose clock the caller controls: proves orderings that a real one only sometimes breaks.

Work is enqueued at once and happens when the clock moves. A copy spoils its destination when it
begins and delivers when it ends, and fails when its source changed in between; so a wait that is
missing anywhere becomes a wrong byte.
"""

import threading
import weakref
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from endor import kernels
from endor.codecs import Encoded
from endor.errors import BackendError
from endor.kernels.gpu import DeviceEncoded

SPOILED = 0xDD


@dataclass(eq=False, slots=True)
class FakeEvent:
    """An event: how often it was recorded, how many of those have happened, and when."""

    recorded: int = 0
    happened: int = 0
    at: float = 0.0


@dataclass(slots=True)
class _Work:
    seconds: float
    begin: Callable[[], None]
    end: Callable[[], None]
    enqueued: float
    finish: float | None = None


@dataclass(slots=True)
class _Signal:
    event: FakeEvent
    turn: int
    wait: bool


@dataclass(slots=True)
class _Stream:
    queue: deque[_Work | _Signal] = field(default_factory=deque)
    time: float = 0.0
    busy: float = 0.0


class FakeExpansion:
    """Decodes on the processor what the simulated device holds when the work before it is over."""

    def __init__(
        self, device: "FakeDevice", items: Sequence[tuple[DeviceEncoded, torch.Tensor]]
    ) -> None:
        self._device = device
        self._items = items

    def run(self) -> None:
        self._device.drain()
        for packed, out in self._items:
            storage = packed.storage.numpy()
            arrays = {}
            for array in packed.spec.arrays:
                begin = packed.offsets[array.suffix]
                flat = storage[begin : begin + array.nbytes].view(array.dtype.uint)
                arrays[array.suffix] = flat.reshape(array.shape)
            bits = np.empty(packed.spec.numel, dtype=packed.spec.dtype.uint)
            kernels.decode(Encoded(packed.spec, arrays), bits, threads=1)
            signed = torch.from_numpy(bits.view(f"i{bits.itemsize}"))
            out.view(-1).view(signed.dtype).copy_(signed)


class FakeDevice:
    """Implements `endor.offload.device.Device` on simulated time; safe for threads.

    Args:
        bytes_per_s: Speed of copies.
        pinnable_bytes: Host memory that may be page-locked.
        total_bytes: Device memory.

    Attributes:
        device: The CPU: what `allocate` returns can be looked at.
        allocated_bytes: Device memory that `allocate` gave and that is still in use.
        now: Simulated seconds.
        pinned_bytes: Host memory that is page-locked.
        errors: What went wrong inside streams; must stay empty.
    """

    def __init__(
        self,
        *,
        bytes_per_s: float = 1e9,
        pinnable_bytes: int = 1 << 60,
        total_bytes: int = 24 << 30,
    ) -> None:
        self.device = torch.device("cpu")
        self.total_bytes = total_bytes
        self.allocated_bytes = 0
        self.now = 0.0
        self.pinned_bytes = 0
        self.errors: list[str] = []
        self._bytes_per_s = bytes_per_s
        self._pinnable_bytes = pinnable_bytes
        self._lock = threading.RLock()
        self._streams: dict[Hashable, _Stream] = {"copy": _Stream()}
        self._copying: list[np.ndarray] = []

    # ---- the protocol --------------------------------------------------------------------------

    def allocate(self, nbytes: int) -> torch.Tensor:
        memory = np.full(nbytes, SPOILED, dtype=np.uint8)
        self.allocated_bytes += nbytes
        weakref.finalize(memory, self._free, nbytes).atexit = False
        return torch.from_numpy(memory)

    def _free(self, nbytes: int) -> None:
        self.allocated_bytes -= nbytes

    def memory(self) -> tuple[int, int]:
        return self.total_bytes - self.allocated_bytes, self.total_bytes

    def prepare(self, items: Sequence[tuple[DeviceEncoded, torch.Tensor]]) -> FakeExpansion:
        return FakeExpansion(self, items)

    def event(self) -> FakeEvent:
        return FakeEvent()

    def pin(self, memory: np.ndarray) -> str | None:
        if self.pinned_bytes + memory.nbytes > self._pinnable_bytes:
            return "the simulated limit of locked memory is reached"
        self.pinned_bytes += memory.nbytes
        return None

    def unpin(self, memory: np.ndarray) -> None:
        self.pinned_bytes -= memory.nbytes

    def enter_thread(self) -> None:
        pass

    def copy(self, destination: torch.Tensor, source: np.ndarray) -> None:
        target = destination.numpy()[: source.nbytes]
        before = source.copy()

        def begin() -> None:
            target[:] = SPOILED
            self._copying.append(target)

        def end() -> None:
            if not np.array_equal(source, before):
                self.errors.append("a copy's source changed before the copy was over")
            target[:] = source
            self._copying = [other for other in self._copying if other is not target]

        with self._lock:
            self._enqueue("copy", source.nbytes / self._bytes_per_s, begin, end)

    def copy_back(self, destination: np.ndarray, source: torch.Tensor) -> None:
        origin = source.numpy()
        before = origin.copy()

        def begin() -> None:
            destination[:] = SPOILED

        def end() -> None:
            if not np.array_equal(origin, before):
                self.errors.append("the source of a copy to the host changed before it was over")
            destination[:] = origin

        with self._lock:
            self._enqueue("copy", destination.nbytes / self._bytes_per_s, begin, end)

    def record_copy(self, event: FakeEvent) -> None:
        self._signal("copy", event, wait=False)

    def await_in_copy(self, event: FakeEvent) -> None:
        self._signal("copy", event, wait=True)

    def compute_stream(self) -> Hashable:
        return threading.get_ident()

    def record_compute(self, event: FakeEvent) -> None:
        self._signal(self.compute_stream(), event, wait=False)

    def await_in_compute(self, event: FakeEvent) -> None:
        self._signal(self.compute_stream(), event, wait=True)

    def synchronize(self, event: FakeEvent) -> None:
        with self._lock:
            turn = event.recorded
            while event.happened < turn:
                if not self._step(float("inf")):
                    raise BackendError("the simulated device waits for an event for ever")

    # ---- the simulation ------------------------------------------------------------------------

    def compute(self, seconds: float, begin: Callable[[], None], end: Callable[[], None]) -> None:
        """Enqueue work on the caller's stream; `begin` and `end` run at those moments."""
        with self._lock:
            self._enqueue(self.compute_stream(), seconds, begin, end)

    def is_written(self, memory: np.ndarray) -> bool:
        """Return whether a copy into `memory` is going on at this moment."""
        return any(np.shares_memory(memory, other) for other in self._copying)

    def advance(self, seconds: float) -> None:
        """Let the clock run for so long."""
        with self._lock:
            stop = self.now + seconds
            while self._step(stop):
                pass
            self.now = max(self.now, stop)

    def drain(self) -> None:
        """Let the clock run until nothing more can happen.

        Raises:
            BackendError: Work is left that waits for an event for ever.
        """
        with self._lock:
            while self._step(float("inf")):
                pass
            left = sum(len(stream.queue) for stream in self._streams.values())
            if left:
                raise BackendError(f"{left} operations of the simulated device wait for ever")

    def busy_s(self, stream: Hashable = "copy") -> float:
        """Return the time that a stream has worked."""
        return self._streams[stream].busy

    def _signal(self, stream: Hashable, event: FakeEvent, *, wait: bool) -> None:
        with self._lock:
            if not wait:
                event.recorded += 1
            queue = self._streams.setdefault(stream, _Stream()).queue
            queue.append(_Signal(event, event.recorded, wait))

    def _enqueue(
        self,
        stream: Hashable,
        seconds: float,
        begin: Callable[[], None],
        end: Callable[[], None],
    ) -> None:
        queue = self._streams.setdefault(stream, _Stream()).queue
        queue.append(_Work(seconds, begin, end, self.now))

    def _step(self, limit: float) -> bool:
        """Let the next thing happen unless it lies after `limit`; return whether one did."""
        if any([self._settle(stream) for stream in self._streams.values()]):
            return True  # a signal of one stream may free another
        chosen: tuple[float, _Stream, _Work] | None = None
        for stream in self._streams.values():
            work = stream.queue[0] if stream.queue else None
            if not isinstance(work, _Work):
                continue
            at = work.finish if work.finish is not None else max(stream.time, work.enqueued)
            if chosen is None or at < chosen[0]:
                chosen = (at, stream, work)
        if chosen is None or chosen[0] > limit:
            return False
        at, stream, work = chosen
        self.now = max(self.now, at)
        if work.finish is None:
            work.begin()
            work.finish = at + work.seconds
        else:
            work.end()
            stream.time = at
            stream.busy += work.seconds
            stream.queue.popleft()
        return True

    def _settle(self, stream: _Stream) -> bool:
        """Pass the signals at the head of a stream that can be passed; return whether any was."""
        passed = False
        while stream.queue:
            head = stream.queue[0]
            if isinstance(head, _Work) or (head.wait and head.event.happened < head.turn):
                break
            if head.wait:
                stream.time = max(stream.time, head.event.at)
            else:
                head.event.happened = max(head.event.happened, head.turn)
                head.event.at = stream.time
            stream.queue.popleft()
            passed = True
        return passed
