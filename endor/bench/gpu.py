"""Kernels and the link of a CUDA device, each figure beside the bandwidth that bounds it.

Times are CUDA events around replays of a CUDA graph of several launches, over rotating buffers
whose footprint is four times the second-level cache. Traffic counts every byte read and written
once. Each subject is checked, poisoned output and all, before it is timed; a wrong one raises.
"""

import importlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch

from endor import kernels
from endor.bench.records import BenchRecord, environment
from endor.codecs import DTYPES, CodecChoice, Encoded
from endor.errors import EndorError
from endor.kernels import gpu, gpu_plan
from endor.kernels.gpu import DeviceEncoded
from endor.offload.arena import PinnedArena
from endor.offload.copier import Copier
from endor.offload.device import CudaDevice
from endor.storage import HostBuffer

LINK_SIZES = (1 << 20, 4 << 20, 64 << 20)
COPY_BYTES = 1 << 30


@dataclass(frozen=True, slots=True)
class GpuCase:
    """One weight to measure with.

    Attributes:
        rows, cols: Its shape; cols a multiple of 32.
        density: Share of weights that are stored.
        seed: Of the weights.
        repeats: Timed replays.
    """

    rows: int = 4096
    cols: int = 11008
    density: float = 0.5
    seed: int = 0
    repeats: int = 15


@dataclass(frozen=True, slots=True)
class _Packed:
    """A weight in one stored form, several times on the device."""

    name: str
    encoded: Encoded
    copies: Sequence[DeviceEncoded]


def copy_bandwidth(nbytes: int = COPY_BYTES, *, repeats: int = 7) -> float:
    """Return the bandwidth of a copy inside device memory, bytes read and written, in 1e9 a s."""
    source = torch.empty(nbytes, dtype=torch.uint8, device="cuda").random_()
    out = torch.empty_like(source)
    samples = _time([lambda: out.copy_(source)], launches=4, repeats=repeats)
    return 2 * nbytes / float(np.median(samples)) / 1e9


def expansion(case: GpuCase) -> Iterator[BenchRecord]:
    """Yield the expansion of one weight in every stored form, and what else can do it.

    Raises:
        EndorError: A result was wrong.
    """
    weight = _weight(case)
    sets = _sets(weight.nbytes)
    outs = [torch.empty_like(weight) for _ in range(sets)]
    sources = [weight.clone() for _ in range(sets)]
    ceiling = _ceiling(
        case,
        [partial(out.copy_, source) for out, source in zip(outs, sources, strict=True)],
        2 * weight.nbytes,
    )
    yield ceiling
    forms: tuple[tuple[str, CodecChoice, bool, bool], ...] = (
        ("raw", "raw", True, True),
        ("exp", "exp", True, True),
        ("exp without bitmap", "exp", False, False),
    )
    for name, codec, bitmap, pruned in forms:
        dense = weight if pruned else _weight(replace(case, density=1.0))
        packed = _pack(name, dense, codec, bitmap, sets)
        expected = dense
        for warps in (4, 8):
            plans = [
                gpu_plan.plan_expansion(
                    [gpu_plan.Part(copy.spec, copy.addresses, out.data_ptr())], warps=warps
                )
                for copy, out in zip(packed.copies, outs, strict=True)
            ]
            works = [gpu.Expansion(plan, []) for plan in plans]
            _check(works[0].run, outs[0], expected, f"{name}, {warps} warps")
            samples = _time([work.run for work in works], repeats=case.repeats)
            for at, out in enumerate(outs):
                _same(out, expected, f"{name}, buffer {at}")
            spec = packed.encoded.spec
            note = f"{warps} warps a block, {spec.bits_per_weight:.2f} bits a weight"
            if spec.codec == "exp":
                note += f", k={spec.k}, {spec.patches} patches"
            yield _record(
                case, f"endor {name}", samples, spec.nbytes + dense.nbytes, ceiling, note,
                packed_bytes=spec.nbytes,
            )  # fmt: skip
    yield from _masked_scatter(case, weight, outs, ceiling)
    yield from _nvcomp(case, weight, ceiling)


def products(case: GpuCase, batches: Sequence[int] = (1, 2, 4, 8)) -> Iterator[BenchRecord]:
    """Yield products from the packed form and torch's dense ones, by batch.

    Raises:
        EndorError: A result was wrong.
    """
    weight = _weight(case)
    sets = _sets(weight.nbytes // 2)
    sources = [weight.clone() for _ in range(sets)]
    packed = _pack("raw", weight, "raw", True, sets)
    spec = packed.encoded.spec
    ceiling = _ceiling(
        case, [partial(source.copy_, weight) for source in sources], 2 * weight.nbytes
    )
    generator = torch.Generator(device="cuda").manual_seed(case.seed)
    limit = gpu.shared_limit(0)
    for batch in batches:
        x = torch.randn(batch, case.cols, generator=generator, device="cuda").to(weight.dtype)
        samples = _time(
            [partial(torch.nn.functional.linear, x, source) for source in sources],
            repeats=case.repeats,
        )
        yield _record(
            case, f"torch F.linear, batch {batch}", samples, weight.nbytes, ceiling, peer=True
        )
        expected = x.double() @ weight.double().T
        y = torch.full((batch, case.rows), float("nan"), device="cuda")
        for pairs in (1, 2):
            for warps in (2, 4, 8):
                launches = [
                    gpu_plan.plan_product(
                        spec,
                        copy.addresses,
                        x=x.data_ptr(),
                        y=y.data_ptr(),
                        batch=batch,
                        float_out=True,
                        segment_nnz=copy.segment_nnz,
                        row_pairs=pairs,
                        warps=warps,
                        shared_limit=limit,
                    )
                    for copy in packed.copies
                ]
                works = [gpu.Expansion([launch], []) for launch in launches]
                y.fill_(float("nan"))
                works[0].run()
                error = float((y.double() - expected).abs().max() / expected.abs().max())
                if not error < 1e-4:
                    raise EndorError(f"product {case}, batch {batch}: relative error {error}")
                samples = _time([work.run for work in works], repeats=case.repeats)
                note = f"{pairs} row pairs, {launches[0].block // 32} warps"
                yield _record(
                    case, f"endor product, batch {batch}", samples, spec.nbytes, ceiling, note,
                    packed_bytes=spec.nbytes,
                )  # fmt: skip


def link(case: GpuCase, sizes: Sequence[int] = LINK_SIZES) -> Iterator[BenchRecord]:
    """Yield pinned copies to the device by size, then units streamed, expanded and multiplied.

    Raises:
        EndorError: A streamed weight was wrong.
    """
    device = CudaDevice("cuda")
    buffer = HostBuffer(max(sizes))
    arena = PinnedArena(device, [buffer])
    target = device.allocate(max(sizes))
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
        record = _record(case, f"pinned copy of {size >> 20} MiB", samples, size, None, shape=size)
        best = max(best, record.gbps)
        yield record
    arena.close()
    yield from _streamed(case, device, best)


def _streamed(case: GpuCase, device: CudaDevice, link_gbps: float) -> Iterator[BenchRecord]:
    """Steps over eight weights in locked RAM: copy, expand, multiply, through three slots."""
    weight = _weight(case)
    x = torch.randn(1, case.cols, device="cuda").to(weight.dtype)
    expected = torch.nn.functional.linear(x, weight)
    codecs: tuple[CodecChoice, ...] = ("raw", "exp")
    for codec in codecs:
        packed = _pack(codec, weight, codec, True, 1)
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
        yield _record(
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
        slots = [device.allocate(host.nbytes) for _ in range(3)]
        self.copier = Copier(
            device, _Resident(self._home.array, host.nbytes), slots, range(self.count)
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

    def acquire(self, unit: int) -> np.ndarray:
        return self._memory[unit * self._nbytes : (unit + 1) * self._nbytes]

    def issued(self, unit: int, event: object) -> None:
        pass

    def reads_directly(self, unit: int) -> bool:
        return False

    def read_into(self, unit: int, buffer: torch.Tensor) -> int:
        raise AssertionError("locked memory is copied from, never read into")


def _weight(case: GpuCase) -> torch.Tensor:
    """A normal bf16 weight on the device, its smallest magnitudes pruned away."""
    generator = torch.Generator(device="cuda").manual_seed(case.seed)
    weight = torch.randn(case.rows, case.cols, generator=generator, device="cuda") * 0.02
    if case.density < 1:
        sample = weight.abs().flatten()[:: max(1, weight.numel() // 1_000_000)]
        weight[weight.abs() < sample.quantile(1 - case.density)] = 0
    return weight.to(torch.bfloat16)


def _pack(name: str, weight: torch.Tensor, codec: CodecChoice, bitmap: bool, sets: int) -> _Packed:
    bits = weight.cpu().view(torch.int16).numpy().view(np.uint16)
    encoded = kernels.encode(bits, DTYPES["BF16"], codec=codec, bitmap=bitmap)
    first = gpu.upload(encoded, "cuda")
    others = [replace(first, storage=first.storage.clone()) for _ in range(sets - 1)]
    return _Packed(name, encoded, [first, *others])


def _sets(nbytes: int) -> int:
    """Buffers to rotate over, so that no run finds its data in the cache."""
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    return max(2, min(12, -(-4 * cache // nbytes) + 1))


def _time(
    works: Sequence[Callable[[], object]], *, launches: int | None = None, repeats: int = 15
) -> list[float]:
    """Return seconds per launch, one sample per replay of a graph of launches."""
    for work in works:
        work()
    torch.cuda.synchronize()
    count = launches or max(len(works), 8)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for at in range(count):
            works[at % len(works)]()
    graph.replay()
    torch.cuda.synchronize()
    samples = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        samples.append(begin.elapsed_time(end) / 1e3 / count)
    return samples


def _check(run: Callable[[], None], out: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    out.view(torch.int16).fill_(0x5A5A)
    run()
    _same(out, expected, what)


def _same(out: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    wrong = out.view(torch.int16) != expected.view(torch.int16)
    if bool(wrong.any()):
        at = int(wrong.flatten().nonzero()[0])
        raise EndorError(f"{what}: {int(wrong.sum())} elements are wrong, the first at {at}")


def _record(
    case: GpuCase,
    subject: str,
    samples: Sequence[float],
    traffic: int,
    ceiling: BenchRecord | None,
    note: str = "",
    *,
    packed_bytes: int = 0,
    peer: bool = False,
    shape: int = 0,
) -> BenchRecord:
    p20, p50, p80 = (float(value) for value in np.quantile(samples, (0.2, 0.5, 0.8)))
    properties = torch.cuda.get_device_properties(0)
    described = environment(f"{properties.name}, {properties.multi_processor_count} SMs")
    driver = f"CUDA driver {gpu.describe()['driver']}"
    return BenchRecord(
        bench="gpu",
        subject=subject,
        shape=(shape,) if shape else (case.rows, case.cols),
        dtype="BF16",
        density=case.density,
        threads=0,
        p20=p20,
        p50=p50,
        p80=p80,
        repeats=len(samples),
        traffic_bytes=traffic,
        environment=replace(described, driver=driver),
        dense_bytes=0 if shape else 2 * case.rows * case.cols,
        packed_bytes=packed_bytes,
        ceiling=ceiling.subject if ceiling else "",
        ceiling_gbps=ceiling.gbps if ceiling else 0.0,
        peer=peer,
        note=note,
    )


def _ceiling(case: GpuCase, works: Sequence[Callable[[], object]], traffic: int) -> BenchRecord:
    return _record(case, "copy in device memory", _time(works, repeats=case.repeats), traffic, None)


def _link_ceiling(case: GpuCase, gbps: float) -> BenchRecord:
    return _record(case, "largest pinned copy", [1 / (gbps * 1e9)], 1, None)


def _masked_scatter(
    case: GpuCase, weight: torch.Tensor, outs: Sequence[torch.Tensor], ceiling: BenchRecord
) -> Iterator[BenchRecord]:
    """torch's way, its mask already a bool tensor: a byte a weight."""
    mask, values = weight != 0, weight[weight != 0]
    traffic = mask.nbytes + values.nbytes + weight.nbytes

    def run() -> None:
        outs[0].zero_().masked_scatter_(mask, values)

    run()
    _same(outs[0], weight, "masked_scatter_")
    samples = []
    for _ in range(5):
        torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        torch.cuda.synchronize()
        samples.append(time.perf_counter() - start)
    yield _record(
        case, "torch masked_scatter_", samples, traffic, ceiling, "mask of bools, not packed",
        packed_bytes=mask.nbytes + values.nbytes, peer=True,
    )  # fmt: skip


def _nvcomp(case: GpuCase, weight: torch.Tensor, ceiling: BenchRecord) -> Iterator[BenchRecord]:
    """General-purpose GPU codecs, where the package is installed."""
    try:
        nvcomp = importlib.import_module("nvidia.nvcomp")
    except ImportError:
        return
    flat = weight.view(torch.uint8).flatten()
    for algorithm in ("ANS", "Bitcomp", "LZ4"):
        codec = nvcomp.Codec(algorithm=algorithm)
        compressed = codec.encode(nvcomp.as_array(flat))
        samples = []
        for _ in range(5):
            torch.cuda.synchronize()
            start = time.perf_counter()
            decoded = codec.decode(compressed)
            torch.cuda.synchronize()
            samples.append(time.perf_counter() - start)
        same = torch.equal(
            torch.utils.dlpack.from_dlpack(decoded).view(torch.uint8).flatten(), flat
        )
        packed = int(compressed.buffer_size)
        note = f"{8 * packed / weight.numel():.2f} bits a weight" + ("" if same else ", WRONG")
        yield _record(
            case, f"nvCOMP {algorithm}", samples, packed + weight.nbytes, ceiling, note,
            packed_bytes=packed, peer=True,
        )  # fmt: skip
