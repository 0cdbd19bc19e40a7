"""What the device benchmarks share: the weight, its packed copies, timing, checking, records."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from endor import kernels
from endor.bench.records import BenchRecord, environment
from endor.codecs import DTYPES, CodecChoice, Encoded
from endor.errors import EndorError
from endor.kernels import gpu, gpu_device
from endor.kernels.gpu import DeviceEncoded


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
class Packed:
    """A weight in one stored form, several times on the device."""

    name: str
    encoded: Encoded
    copies: Sequence[DeviceEncoded]


def make_weight(case: GpuCase) -> torch.Tensor:
    """Return a normal bf16 weight on the device, its smallest magnitudes pruned away."""
    generator = torch.Generator(device="cuda").manual_seed(case.seed)
    weight = torch.randn(case.rows, case.cols, generator=generator, device="cuda") * 0.02
    if case.density < 1:
        sample = weight.abs().flatten()[:: max(1, weight.numel() // 1_000_000)]
        weight[weight.abs() < sample.quantile(1 - case.density)] = 0
    return weight.to(torch.bfloat16)


def pack_copies(
    name: str, weight: torch.Tensor, codec: CodecChoice, bitmap: bool, sets: int
) -> Packed:
    """Return `weight` packed, with `sets` copies on the device."""
    bits = weight.cpu().view(torch.int16).numpy().view(np.uint16)
    encoded = kernels.encode(bits, DTYPES["BF16"], codec=codec, bitmap=bitmap)
    first = gpu.upload(encoded, "cuda")
    others = [replace(first, storage=first.storage.clone()) for _ in range(sets - 1)]
    return Packed(name, encoded, [first, *others])


def rotation(nbytes: int) -> int:
    """Return how many buffers to rotate over, so that no run finds its data in the cache."""
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    return max(2, min(12, -(-4 * cache // nbytes) + 1))


def time_graph(
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


def check_run(
    run: Callable[[], None], out: torch.Tensor, expected: torch.Tensor, what: str
) -> None:
    """Run over a poisoned output; fail unless it then is `expected`."""
    out.view(torch.int16).fill_(0x5A5A)
    run()
    require_same(out, expected, what)


def require_same(out: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    """Fail unless the bits of bf16 `out` are those of `expected`.

    Raises:
        EndorError: They are not.
    """
    wrong = out.view(torch.int16) != expected.view(torch.int16)
    if bool(wrong.any()):
        at = int(wrong.flatten().nonzero()[0])
        raise EndorError(f"{what}: {int(wrong.sum())} elements are wrong, the first at {at}")


def gpu_record(
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
    """Return the record of seconds a launch, `traffic` bytes each, beside what bounds them."""
    p20, p50, p80 = (float(value) for value in np.quantile(samples, (0.2, 0.5, 0.8)))
    properties = torch.cuda.get_device_properties(0)
    described = environment(f"{properties.name}, {properties.multi_processor_count} SMs")
    driver = f"CUDA driver {gpu_device.describe()['driver']}"
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
