"""The link to a CUDA device: pinned copies by size, then units streamed, expanded, multiplied."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch

from endor.bench.gpu.case import GpuCase, gpu_record, make_weight, pack_copies
from endor.bench.records import BenchRecord
from endor.codecs import CodecChoice
from endor.errors import EndorError
from endor.kernels import gpu
from endor.kernels.gpu import DeviceEncoded
from endor.offload.copier import Copier
from endor.offload.device import CudaDevice, allocate_for_copies
from endor.offload.pinned import PinnedArena
from endor.offload.schedule import Schedule
from endor.storage import HostBuffer

LINK_SIZES = (1 << 20, 4 << 20, 64 << 20)


def link(case: GpuCase, sizes: Sequence[int] = LINK_SIZES) -> Iterator[BenchRecord]:
    """Yield pinned copies to the device by size, then units streamed, expanded and multiplied.

    Raises:
        EndorError: A streamed weight was wrong.
    """
    device = CudaDevice("cuda")
    buffer = HostBuffer(max(sizes))
    arena = PinnedArena(device, [buffer])
    target = allocate_for_copies(device, max(sizes))
    best = 0.0
    for size in sizes:
        part = buffer.array[:size]

        def copies(part: np.ndarray = part) -> None:
            for _ in range(max(1, (256 << 20) // part.nbytes)):
                device.copy(target, part)

        count = max(1, (256 << 20) // size)
        copies()
        device.drain()
        samples = []
        for _ in range(case.repeats):
            start = time.perf_counter()
            copies()
            device.drain()
            samples.append((time.perf_counter() - start) / count)
        record = gpu_record(
            case, f"pinned copy of {size >> 20} MiB", samples, size, None, shape=size
        )
        best = max(best, record.gbps)
        yield record
    arena.close()
    yield from _streamed(case, device, best)


def _streamed(case: GpuCase, device: CudaDevice, link_gbps: float) -> Iterator[BenchRecord]:
    """Steps over eight weights in locked RAM: copy, expand, multiply, through three slots."""
    weight = make_weight(case)
    x = torch.randn(1, case.cols, device="cuda").to(weight.dtype)
    expected = torch.nn.functional.linear(x, weight)
    codecs: tuple[CodecChoice, ...] = ("raw", "exp")
    for codec in codecs:
        packed = pack_copies(codec, weight, codec, True, 1)
        stream = _Stream(device, packed.copies[0], weight)
        for _ in range(3):
            if not torch.equal(stream.step(x), expected):
                raise EndorError(f"streamed {codec}: the product is not that of the dense weight")
        torch.cuda.synchronize()
        samples = []
        for _ in range(case.repeats):
            start = time.perf_counter()
            stream.step(x)
            torch.cuda.synchronize()
            samples.append((time.perf_counter() - start) / stream.count)
        stalled = stream.copier.counters.stall_s
        stream.close()
        spec = packed.encoded.spec
        note = f"{spec.bits_per_weight:.2f} bits a weight; takers waited {stalled:.4f} s"
        yield gpu_record(
            case, f"streamed {codec}: copy, expand, multiply", samples, stream.nbytes,
            _link_ceiling(case, link_gbps), note, packed_bytes=spec.nbytes,
        )  # fmt: skip


class _Stream:
    """Eight equal weights in locked RAM, a copier and two scratch buffers."""

    count = 8

    def __init__(self, device: CudaDevice, packed: DeviceEncoded, like: torch.Tensor) -> None:
        host = packed.storage.cpu().numpy()
        self.nbytes = host.nbytes
        self._home = HostBuffer(host.nbytes * self.count)
        for at in range(self.count):
            self._home.array[at * host.nbytes : (at + 1) * host.nbytes] = host
        self._device = device
        self._packed = packed
        self._arena = PinnedArena(device, [self._home])
        slots = [allocate_for_copies(device, host.nbytes) for _ in range(3)]
        self.copier = Copier(
            device, _Resident(self._home.array, host.nbytes), slots, Schedule(range(self.count))
        )
        self._scratch = [torch.empty_like(like) for _ in range(2)]
        self._prepared: dict[tuple[int, int], gpu.Expansion] = {}

    def step(self, x: torch.Tensor) -> torch.Tensor:
        """Multiply x by each weight in turn; return the last product."""
        y = x
        for unit in range(self.count):
            slot = self.copier.take(unit)
            scratch = self._scratch[unit % 2]
            key = (slot.index, unit % 2)
            if key not in self._prepared:
                item = replace(self._packed, storage=slot.buffer)
                self._prepared[key] = gpu.prepare([(item, scratch)])
            self._prepared[key].run()
            self.copier.release(slot)
            y = torch.nn.functional.linear(x, scratch)
        return y

    def close(self) -> None:
        self.copier.close()
        self._device.drain()
        self._arena.close()


class _Resident:
    """A copier's source: equal units side by side in locked memory."""

    def __init__(self, memory: np.ndarray, nbytes: int) -> None:
        self._memory = memory
        self._nbytes = nbytes

    def acquire(self, unit: int) -> list[tuple[int, np.ndarray]]:
        return [(0, self._memory[unit * self._nbytes : (unit + 1) * self._nbytes])]

    def issued(self, unit: int, event: object) -> None:
        pass

    def reads_directly(self, unit: int) -> bool:
        return False

    def read_into(self, unit: int, buffer: torch.Tensor) -> int:
        raise AssertionError("locked memory is copied from, never read into")


def _link_ceiling(case: GpuCase, gbps: float) -> BenchRecord:
    return gpu_record(case, "largest pinned copy", [1 / (gbps * 1e9)], 1, None)
