"""A device as the copier sees it: memory, a copy stream, the callers' streams, events.

`CudaDevice` is the real one. `FakeDevice` of the tests has the same meaning on a clock
that tests control, so that the host's logic is proved where there is no GPU.
"""

from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import numpy as np
import torch

from endor.errors import BackendError
from endor.kernels import gpu, gpu_device
from endor.kernels.gpu import DeviceEncoded
from endor.kernels.gpu_multiply import Multiplication
from endor.offload.page_locks import PageLocks
from endor.version import __version__

_HOST_TO_DEVICE = 1
_DEVICE_TO_HOST = 2


class Runnable(Protocol):
    """Prepared work; see `endor.kernels.gpu.Expansion`."""

    def run(self) -> None:
        """Enqueue it on the caller's current stream."""


class Product(Protocol):
    """Products with a packed weight; see `endor.kernels.gpu_multiply.Multiplication`."""

    def run(self, x: torch.Tensor, out: torch.Tensor) -> None:
        """Enqueue `out = x @ W.T` on the caller's current stream."""


class Device(Protocol):
    """What copying to a device needs. Streams run in order; only events order one after another.

    An event may be recorded again: whoever waits, waits for the last recording before the wait.

    Attributes:
        device: Where `allocate` places memory.
    """

    device: torch.device

    def allocate(self, nbytes: int) -> torch.Tensor:
        """Return `nbytes` of device memory, u8, at a multiple of 256 on a real device.

        Work enqueued before on the caller's current stream may still use it: an allocator hands
        memory on before the device is done. Copies into it follow `await_in_copy` of an event
        recorded after this; `allocate_for_copies` does both.

        Raises:
            BackendError: There is not enough.
        """

    def memory(self) -> tuple[int, int]:
        """Return (free, total) bytes of device memory."""

    def prepare(self, items: Sequence[tuple[DeviceEncoded, torch.Tensor]]) -> Runnable:
        """Return the expansion of stored tensors, each into its dense tensor; see `gpu.prepare`."""

    def prepare_product(self, packed: DeviceEncoded) -> Product:
        """Return what multiplies by a stored tensor where it lies; errors as `Multiplication`'s."""

    def facts(self) -> dict[str, Any]:
        """Return what, when it changes, makes measured times worthless."""

    def seconds(self, work: Callable[[], None]) -> float:
        """Return what enqueued work takes on the device: the least of some runs after a first."""

    def event(self) -> Any:
        """Return a new event that was never recorded; waiting for it is no wait."""

    def pin(self, memory: np.ndarray) -> str | None:
        """Page-lock host memory, so that copies from it do not involve the processor.

        Returns:
            None, or why the system refused.
        """

    def unpin(self, memory: np.ndarray) -> None:
        """Undo `pin`."""

    def current(self) -> AbstractContextManager[None]:
        """Make this the calling thread's device for a while; copies need it."""

    def copy(self, destination: torch.Tensor, source: np.ndarray) -> None:
        """Enqueue a copy on the copy stream. The source must stay as it is until it happened."""

    def copy_back(self, destination: np.ndarray, source: torch.Tensor) -> None:
        """Enqueue a copy to the host on the copy stream; both must stay until it happened."""

    def copy_down(self, destination: np.ndarray, source: torch.Tensor) -> None:
        """Enqueue a small copy to the host on the caller's current stream, behind its work.

        As for `copy_back` otherwise: the copy stream's copies go on meanwhile.
        """

    def copy_up(self, destination: torch.Tensor, source: np.ndarray) -> None:
        """Enqueue a small copy to the device on the caller's current stream, before later work.

        As for `copy` otherwise.
        """

    def record_copy(self, event: Any) -> None:
        """Record an event behind all copies so far."""

    def await_in_copy(self, event: Any) -> None:
        """Let later copies wait for an event; the host does not."""

    def compute_stream(self) -> Hashable:
        """Return what identifies the caller's current stream."""

    def capturing(self) -> bool:
        """Return whether the caller's current stream is being captured into a CUDA graph."""

    def record_compute(self, event: Any) -> None:
        """Record an event behind all work of the caller's current stream."""

    def await_in_compute(self, event: Any) -> None:
        """Let later work of the caller's current stream wait for an event; the host does not."""

    def is_over(self, event: Any) -> bool:
        """Whether what was recorded last has happened; waits for nothing."""

    def synchronize(self, event: Any) -> None:
        """Return when the event has happened."""

    def drain(self) -> None:
        """Return when all work has happened."""


def allocate_for_copies(device: Device, nbytes: int) -> torch.Tensor:
    """Return device memory that copies may fill at once; errors as for `allocate`."""
    memory = device.allocate(nbytes)
    ready = device.event()
    device.record_compute(ready)
    device.await_in_copy(ready)
    return memory


class CudaDevice:
    """A CUDA device with a copy stream of its own.

    Args:
        device: Such as `"cuda:0"`.

    Raises:
        BackendError: The kernels cannot run there.
    """

    def __init__(self, device: torch.device | str = "cuda") -> None:
        gpu_device.require(device)
        target = torch.device(device)
        index = torch.cuda.current_device() if target.index is None else target.index
        self.device = torch.device("cuda", index)
        self.copy_stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        import cupy

        self._cupy = cupy
        self._runtime = cupy.cuda.runtime
        self._locks = PageLocks(self._register, self._unregister)

    def allocate(self, nbytes: int) -> torch.Tensor:
        try:
            return torch.empty(nbytes, dtype=torch.uint8, device=self.device)
        except torch.OutOfMemoryError as error:
            free, total = torch.cuda.mem_get_info(self.device)
            raise BackendError(
                f"{self.device}: {nbytes} bytes of device memory were refused, {free} of {total} "
                f"are free: lower vram ({error})"
            ) from None

    def memory(self) -> tuple[int, int]:
        free, total = torch.cuda.mem_get_info(self.device)
        return free, total

    def prepare(self, items: Sequence[tuple[DeviceEncoded, torch.Tensor]]) -> Runnable:
        return gpu.prepare(items)

    def prepare_product(self, packed: DeviceEncoded) -> Product:
        return Multiplication(packed)

    def facts(self) -> dict[str, Any]:
        return {
            "endor": __version__,
            "torch": torch.__version__,
            "card": torch.cuda.get_device_name(self.device),
        }

    def seconds(self, work: Callable[[], None]) -> float:
        work()  # compiles, and asks the allocator
        stream, best = torch.cuda.current_stream(self.device), float("inf")
        for _ in range(5):
            start, stop = (
                torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
                for _ in range(2)
            )
            start.record(stream)
            work()
            stop.record(stream)
            stop.synchronize()
            best = min(best, start.elapsed_time(stop) / 1e3)
        return best

    def event(self) -> torch.cuda.Event:
        return torch.cuda.Event()  # type: ignore[no-untyped-call]

    def pin(self, memory: np.ndarray) -> str | None:
        return self._locks.lock(memory)

    def unpin(self, memory: np.ndarray) -> None:
        self._locks.unlock(memory)

    def _register(self, address: int, nbytes: int) -> str | None:
        try:
            with self._cupy.cuda.Device(self.device.index):
                self._runtime.hostRegister(address, nbytes, 0)
        except self._runtime.CUDARuntimeError as error:
            # Of "already registered" too: whoever did it will undo it while we copy.
            return str(error)
        return None

    def _unregister(self, address: int) -> None:
        with self._cupy.cuda.Device(self.device.index):
            self._runtime.hostUnregister(address)

    def current(self) -> AbstractContextManager[None]:
        return torch.cuda.device(self.device)

    def copy(self, destination: torch.Tensor, source: np.ndarray) -> None:
        assert source.nbytes <= destination.numel()
        to, origin = destination.data_ptr(), source.ctypes.data
        stream = self.copy_stream.cuda_stream
        for begin, end in self._locks.pieces(source):
            self._memcpy(to + begin, origin + begin, end - begin, _HOST_TO_DEVICE, stream)

    def copy_back(self, destination: np.ndarray, source: torch.Tensor) -> None:
        assert source.numel() == destination.nbytes
        to, origin = destination.ctypes.data, source.data_ptr()
        stream = self.copy_stream.cuda_stream
        for begin, end in self._locks.pieces(destination):
            self._memcpy(to + begin, origin + begin, end - begin, _DEVICE_TO_HOST, stream)

    def copy_down(self, destination: np.ndarray, source: torch.Tensor) -> None:
        assert source.numel() == destination.nbytes
        stream = torch.cuda.current_stream(self.device).cuda_stream
        to, origin = destination.ctypes.data, source.data_ptr()
        for begin, end in self._locks.pieces(destination):
            self._memcpy(to + begin, origin + begin, end - begin, _DEVICE_TO_HOST, stream)

    def copy_up(self, destination: torch.Tensor, source: np.ndarray) -> None:
        assert source.nbytes == destination.numel()
        stream = torch.cuda.current_stream(self.device).cuda_stream
        to, origin = destination.data_ptr(), source.ctypes.data
        for begin, end in self._locks.pieces(source):
            self._memcpy(to + begin, origin + begin, end - begin, _HOST_TO_DEVICE, stream)

    def _memcpy(self, to: int, origin: int, nbytes: int, kind: int, stream: int) -> None:
        self._runtime.memcpyAsync(to, origin, nbytes, kind, stream)

    def record_copy(self, event: torch.cuda.Event) -> None:
        event.record(self.copy_stream)

    def await_in_copy(self, event: torch.cuda.Event) -> None:
        self.copy_stream.wait_event(event)

    def compute_stream(self) -> Hashable:
        return torch.cuda.current_stream(self.device).cuda_stream

    def capturing(self) -> bool:
        with torch.cuda.device(self.device):
            return torch.cuda.is_current_stream_capturing()

    def record_compute(self, event: torch.cuda.Event) -> None:
        event.record(torch.cuda.current_stream(self.device))

    def await_in_compute(self, event: torch.cuda.Event) -> None:
        torch.cuda.current_stream(self.device).wait_event(event)

    def is_over(self, event: torch.cuda.Event) -> bool:
        return bool(event.query())  # type: ignore[no-untyped-call]

    def synchronize(self, event: torch.cuda.Event) -> None:
        event.synchronize()

    def drain(self) -> None:
        torch.cuda.synchronize(self.device)
