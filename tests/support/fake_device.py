"""A device whose clock the caller controls: proves orderings that a real one only sometimes breaks.

Work is enqueued at once and happens when the clock moves. A copy spoils its destination when it
begins and delivers when it ends, and fails when its source changed in between; so a wait that is
missing anywhere becomes a wrong byte. CUDA's rules that a real device may or may not enforce are
kept here: page-locking by whole pages and once, copies inside one registration or none, the
thread's current device, memory that an allocator hands on while work on it is pending.
"""

import threading
import weakref
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch

from endor import kernels
from endor.codecs import Encoded
from endor.errors import BackendError, DTypeError
from endor.kernels import gpu_product
from endor.kernels.gpu import DeviceEncoded
from endor.offload.page_locks import PAGE_BYTES, PageLocks
from endor.packed import bits_of

SPOILED = 0xDD

_thread = threading.local()
"""`index`: the simulated device that is current for a thread, as CUDA has one for each thread."""


def current_index() -> int:
    """Return the number of the calling thread's current simulated device."""
    return int(getattr(_thread, "index", 0))


@dataclass(eq=False, slots=True)
class FakeEvent:
    """An event: how often it was recorded, how many of those have happened, and when.

    `captured`: the capture that recorded it last; 0 for none.
    """

    recorded: int = 0
    happened: int = 0
    at: float = 0.0
    captured: int = 0


@dataclass(slots=True)
class _Work:
    seconds: float
    begin: Callable[[], None]
    end: Callable[[], None]
    enqueued: float
    finish: float | None = None
    over: bool = False


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
        self._device.settle()
        self._device.spend("expansion")
        for packed, out in self._items:
            bits = np.empty(packed.spec.numel, dtype=packed.spec.dtype.uint)
            kernels.decode(encoded_of(packed), bits, threads=1)
            signed = torch.from_numpy(bits.view(f"i{bits.itemsize}"))
            out.view(-1).view(signed.dtype).copy_(signed)


def encoded_of(packed: DeviceEncoded) -> Encoded:
    """Return a tensor as the simulated device holds it now."""
    storage, arrays = packed.storage.numpy(), {}
    for array in packed.spec.arrays:
        begin = packed.offsets[array.suffix]
        flat = storage[begin : begin + array.nbytes].view(array.dtype.uint)
        arrays[array.suffix] = flat.reshape(array.unit_shape)
    return Encoded(packed.spec, arrays)


class FakeProduct:
    """Multiplies by what the simulated device holds when the work before it is over."""

    def __init__(self, device: "FakeDevice", packed: DeviceEncoded) -> None:
        self._device = device
        self._packed = packed
        self.runs = 0

    def run(self, x: torch.Tensor, out: torch.Tensor) -> None:
        self.runs += 1
        self._device.settle()
        self._device.spend("product")
        bits = bits_of(x).view(self._packed.spec.dtype.uint)
        kernels.matvec(encoded_of(self._packed), bits, out.numpy(), threads=1)


class FakeDevice:
    """Implements `endor.offload.device.Device` on simulated time; safe for threads.

    Args:
        index: Its number; copies need it to be the thread's current one.
        bytes_per_s: Speed of copies.
        pinnable_bytes: Host memory that may be page-locked.
        total_bytes: Device memory.
        latency_s: What a small copy on a caller's stream takes beside its bytes.

    Attributes:
        device: The CPU: what `allocate` returns can be looked at.
        allocated_bytes: Device memory that `allocate` gave and that is still in use.
        now: Simulated seconds.
        pinned_bytes: Host memory that is page-locked.
        errors: What went wrong inside streams; must stay empty.
        card: Name of the card.
        costs_s: What a product and an expansion cost, for `seconds`.
        measured: How often `seconds` was called.
        products: What `prepare_product` returned.
    """

    def __init__(
        self,
        *,
        index: int = 0,
        bytes_per_s: float = 1e9,
        pinnable_bytes: int = 1 << 60,
        total_bytes: int = 24 << 30,
        latency_s: Callable[[], float] = lambda: 0.0,
    ) -> None:
        self.index = index
        self.device = torch.device("cpu")
        self.total_bytes = total_bytes
        self.allocated_bytes = 0
        self.now = 0.0
        self.pinned_bytes = 0
        self.errors: list[str] = []
        self._capture, self._captures = 0, 0
        self.card, self.measured = "simulated", 0
        self.costs_s = {"product": 1.0, "expansion": 2.0}
        self.products: list[FakeProduct] = []
        self._spent = 0.0
        self.latency_s = latency_s
        self._bytes_per_s = bytes_per_s
        self._pinnable_bytes = pinnable_bytes
        self._lock = threading.RLock()
        self._streams: dict[Hashable, _Stream] = {"copy": _Stream()}
        self._copying: list[np.ndarray] = []
        self._locks = PageLocks(self._register, self._unregister)
        self._registered: dict[int, tuple[int, int, int]] = {}
        self._blocks: list[tuple[int, int, _Work]] = []

    # ---- the protocol --------------------------------------------------------------------------

    def allocate(self, nbytes: int) -> torch.Tensor:
        self._refuse_in_capture("memory is allocated")
        memory = np.full(nbytes, SPOILED, dtype=np.uint8)
        self.allocated_bytes += nbytes
        address = memory.ctypes.data
        with self._lock:
            # The worst that an allocator may do: a block whose last use is enqueued, not over.
            queue = self._stream(self.compute_stream()).queue
            pending = [work for work in queue if isinstance(work, _Work)]
            if pending:
                self._blocks.append((address, address + nbytes, pending[-1]))
        weakref.finalize(memory, self._free, address, nbytes).atexit = False
        return torch.from_numpy(memory)

    def _free(self, address: int, nbytes: int) -> None:
        self.allocated_bytes -= nbytes
        self._blocks = [block for block in self._blocks if block[0] != address]

    def memory(self) -> tuple[int, int]:
        return self.total_bytes - self.allocated_bytes, self.total_bytes

    def prepare(self, items: Sequence[tuple[DeviceEncoded, torch.Tensor]]) -> FakeExpansion:
        return FakeExpansion(self, items)

    def event(self) -> FakeEvent:
        return FakeEvent()

    def prepare_product(self, packed: DeviceEncoded) -> "FakeProduct":
        why = gpu_product.product_refusal(packed.spec)
        if why:
            raise DTypeError(f"the product kernel cannot run: {why}; expand the weight instead")
        self.products.append(FakeProduct(self, packed))
        return self.products[-1]

    def facts(self) -> dict[str, str]:
        return {"card": self.card}

    def seconds(self, work: Callable[[], None]) -> float:
        """Twice for each run of a product or an expansion what it was given; see `costs_s`."""
        self._refuse_in_capture("the host waits for an event")
        self.measured += 1
        before = self._spent
        work()
        work()
        return self._spent - before

    def spend(self, what: str) -> None:
        """Note that such work ran."""
        self._spent += self.costs_s[what]

    def pin(self, memory: np.ndarray) -> str | None:
        return self._locks.lock(memory)

    def unpin(self, memory: np.ndarray) -> None:
        self._locks.unlock(memory)

    def _register(self, address: int, nbytes: int) -> str | None:
        start = address // PAGE_BYTES * PAGE_BYTES
        stop = -(-(address + nbytes) // PAGE_BYTES) * PAGE_BYTES
        with self._lock:
            if self.pinned_bytes + nbytes > self._pinnable_bytes:
                return "the simulated limit of locked memory is reached"
            if any(start < other and begin < stop for begin, other in self._pages()):
                return "712: part of the memory is registered already"
            self._registered[address] = (start, stop, nbytes)
            self.pinned_bytes += nbytes
        return None

    def _unregister(self, address: int) -> None:
        with self._lock:
            found = self._registered.pop(address, None)
            if found is None:
                self.errors.append(f"713: {address:#x} is not where a registration begins")
            else:
                self.pinned_bytes -= found[2]

    def _pages(self) -> list[tuple[int, int]]:
        return [(start, stop) for start, stop, _ in self._registered.values()]

    @contextmanager
    def current(self) -> Iterator[None]:
        before = current_index()
        _thread.index = self.index
        try:
            yield
        finally:
            _thread.index = before

    def _check_host(self, memory: np.ndarray) -> None:
        """Note an error for what CUDA may refuse: memory that is locked in part or piecewise."""
        if current_index() != self.index:
            self.errors.append(f"a copy of device {self.index} while {current_index()} is current")
        start = memory.ctypes.data
        stop = start + memory.nbytes
        for begin, end in self._pages():
            if begin < stop and start < end and not (begin <= start and stop <= end):
                self.errors.append("a copy crosses the border of a registration")

    def copy(self, destination: torch.Tensor, source: np.ndarray) -> None:
        for begin, end in self._locks.pieces(source):
            self._copy_piece(destination[begin:], source[begin:end], "copy")

    def _copy_seconds(self, nbytes: int, stream: Hashable) -> float:
        return nbytes / self._bytes_per_s + (0.0 if stream == "copy" else self.latency_s())

    def _copy_piece(
        self, destination: torch.Tensor, source: np.ndarray, stream: Hashable = "copy"
    ) -> None:
        target = destination.numpy()[: source.nbytes]
        before = source.copy()
        self._check_host(source)

        def begin() -> None:
            start = target.ctypes.data
            for first, stop, work in self._blocks:
                if first <= start < stop and not work.over:
                    self.errors.append("a copy into memory that enqueued work still uses")
            target[:] = SPOILED
            self._copying.append(target)

        def end() -> None:
            if not np.array_equal(source, before):
                self.errors.append("a copy's source changed before the copy was over")
            target[:] = source
            self._copying = [other for other in self._copying if other is not target]

        with self._lock:
            self._enqueue(stream, self._copy_seconds(source.nbytes, stream), begin, end)

    def copy_up(self, destination: torch.Tensor, source: np.ndarray) -> None:
        for begin, end in self._locks.pieces(source):
            self._copy_piece(destination[begin:], source[begin:end], self.compute_stream())
        self.settle()  # what uses it runs at once

    def copy_down(self, destination: np.ndarray, source: torch.Tensor) -> None:
        for begin, end in self._locks.pieces(destination):
            piece = source[begin:end]
            self._copy_back_piece(destination[begin:end], piece, self.compute_stream())

    def copy_back(self, destination: np.ndarray, source: torch.Tensor) -> None:
        for begin, end in self._locks.pieces(destination):
            self._copy_back_piece(destination[begin:end], source[begin:end], "copy")

    def _copy_back_piece(
        self, destination: np.ndarray, source: torch.Tensor, stream: Hashable
    ) -> None:
        origin = source.numpy()
        before = origin.copy()
        self._check_host(destination)

        def begin() -> None:
            destination[:] = SPOILED

        def end() -> None:
            if not np.array_equal(origin, before):
                self.errors.append("the source of a copy to the host changed before it was over")
            destination[:] = origin

        with self._lock:
            seconds = self._copy_seconds(destination.nbytes, stream)
            self._enqueue(stream, seconds, begin, end)

    def record_copy(self, event: FakeEvent) -> None:
        self._signal("copy", event, wait=False)

    def await_in_copy(self, event: FakeEvent) -> None:
        self._signal("copy", event, wait=True)

    def compute_stream(self) -> Hashable:
        number = self._capturing_here()
        return ("capture", number) if number else threading.get_ident()

    def capturing(self) -> bool:
        return bool(self._capturing_here())

    def record_compute(self, event: FakeEvent) -> None:
        self._signal(self.compute_stream(), event, wait=False)

    def await_in_compute(self, event: FakeEvent) -> None:
        self._signal(self.compute_stream(), event, wait=True)

    def is_over(self, event: FakeEvent) -> bool:
        with self._lock:
            while any([self._settle(stream) for stream in self._streams.values()]):
                pass
            return event.happened >= event.recorded

    def synchronize(self, event: FakeEvent) -> None:
        self._refuse_in_capture("the host waits for an event")
        self._synchronize(event)

    def _synchronize(self, event: FakeEvent) -> None:
        with self._lock:
            turn = event.recorded
            while event.happened < turn:
                if not self._step(float("inf")):
                    raise BackendError("the simulated device waits for an event for ever")

    def settle(self) -> None:
        """Let the clock run until the caller's stream has done what was enqueued."""
        event = self.event()
        self.record_compute(event)
        self._synchronize(event)

    # ---- captures ------------------------------------------------------------------------------

    @contextmanager
    def capture(self) -> Iterator[None]:
        """Let the thread's work go to a stream that is captured, in CUDA's global mode.

        What CUDA refuses meanwhile raises: of every thread allocations and waits of the host, of
        the captured stream waits for what was recorded outside, and of every other stream, for
        ever, waits for what was recorded in the capture.
        """
        assert not self._capture
        self._captures += 1
        self._capture, _thread.capture = self._captures, self._captures
        try:
            yield
        finally:
            self._capture, _thread.capture = 0, 0

    def _capturing_here(self) -> int:
        return self._capture if getattr(_thread, "capture", 0) == self._capture else 0

    def _refuse_in_capture(self, what: str) -> None:
        if self._capture:
            raise BackendError(f"CUDA: {what} while a stream is captured")

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
        inside = self._capturing_here() if stream != "copy" else 0
        if wait and event.recorded and event.captured != inside:
            raise BackendError("CUDA: a wait for an event from the other side of a capture")
        with self._lock:
            if not wait:
                event.recorded += 1
                event.captured = inside
            self._stream(stream).queue.append(_Signal(event, event.recorded, wait))

    def _enqueue(
        self,
        stream: Hashable,
        seconds: float,
        begin: Callable[[], None],
        end: Callable[[], None],
    ) -> None:
        self._stream(stream).queue.append(_Work(seconds, begin, end, self.now))

    def _stream(self, stream: Hashable) -> _Stream:
        return self._streams.setdefault(stream, _Stream())

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
            work.over = True
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
