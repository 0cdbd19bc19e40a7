"""Kernels of a CUDA device, each figure beside the bandwidth that bounds it; `link` the link.

Times are CUDA events around replays of a CUDA graph of several launches, over rotating buffers
whose footprint is four times the second-level cache. Traffic counts every byte read and written
once. Each subject is checked, poisoned output and all, before it is timed; a wrong one raises.
"""

import importlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial

import torch

from endor.bench.gpu.case import (
    GpuCase,
    Packed,
    check_run,
    gpu_record,
    make_weight,
    pack_copies,
    require_same,
    rotation,
    time_graph,
)
from endor.bench.records import BenchRecord
from endor.codecs import CodecChoice
from endor.errors import EndorError
from endor.kernels import gpu, gpu_plan, gpu_product, gpu_run
from endor.kernels.gpu_launch import Part


def expansion(case: GpuCase) -> Iterator[BenchRecord]:
    """Yield the expansion of one weight in every stored form, and what else can do it.

    Raises:
        EndorError: A result was wrong.
    """
    weight = make_weight(case)
    sets = rotation(weight.nbytes)
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
        dense = weight if pruned else make_weight(replace(case, density=1.0))
        packed = pack_copies(name, dense, codec, bitmap, sets)
        expected = dense
        for warps in (4, 8) if codec == "raw" else (8,):  # a block of `exp` is a group
            plans = [
                gpu_plan.plan_expansion(
                    [Part(copy.spec, copy.addresses, out.data_ptr())], warps=warps
                )
                for copy, out in zip(packed.copies, outs, strict=True)
            ]
            works = [gpu.Expansion(plan, []) for plan in plans]
            check_run(works[0].run, outs[0], expected, f"{name}, {warps} warps")
            samples = time_graph([work.run for work in works], repeats=case.repeats)
            for at, out in enumerate(outs):
                require_same(out, expected, f"{name}, buffer {at}")
            spec = packed.encoded.spec
            note = f"{warps} warps a block, {spec.bits_per_weight:.2f} bits a weight"
            if spec.codec == "exp":
                note += f", k={spec.k}, {spec.patches} patches"
            yield gpu_record(
                case, f"endor {name}", samples, spec.nbytes + dense.nbytes, ceiling, note,
                packed_bytes=spec.nbytes,
            )  # fmt: skip
    yield from _masked_scatter(case, weight, outs, ceiling)
    yield from _nvcomp(case, weight, ceiling)


def products(case: GpuCase, batches: Sequence[int] = (1, 2, 4, 8)) -> Iterator[BenchRecord]:
    """Yield products from the packed forms and torch's dense ones, by batch.

    Raises:
        EndorError: A result was wrong.
    """
    weight = make_weight(case)
    sets = rotation(weight.nbytes // 2)
    sources = [weight.clone() for _ in range(sets)]
    forms = [pack_copies(codec, weight, codec, True, sets) for codec in ("raw", "exp")]
    ceiling = _ceiling(
        case, [partial(source.copy_, weight) for source in sources], 2 * weight.nbytes
    )
    generator = torch.Generator(device="cuda").manual_seed(case.seed)
    for batch in batches:
        x = torch.randn(batch, case.cols, generator=generator, device="cuda").to(weight.dtype)
        samples = time_graph(
            [partial(torch.nn.functional.linear, x, source) for source in sources],
            repeats=case.repeats,
        )
        yield gpu_record(
            case, f"torch F.linear, batch {batch}", samples, weight.nbytes, ceiling, peer=True
        )
        expected = x.double() @ weight.double().T
        for packed in forms:
            yield from _products(case, packed, x, expected, ceiling)


def _products(
    case: GpuCase, packed: Packed, x: torch.Tensor, expected: torch.Tensor, ceiling: BenchRecord
) -> Iterator[BenchRecord]:
    """The product of one packed form, with the rows of a warp that are planned and with half."""
    spec, batch = packed.encoded.spec, len(x)
    limit = gpu_run.shared_limit(0)
    y = torch.full((batch, case.rows), float("nan"), device="cuda")
    columns = 1 << (batch - 1).bit_length()
    most = gpu_product.warp_rows(columns, spec.codec)
    for rows in sorted({most, max(most // 2, 2 * columns, 4)}):
        for warps in (4, 8):
            launches = [
                gpu_product.plan_product(
                    spec,
                    copy.addresses,
                    x=x.data_ptr(),
                    y=y.data_ptr(),
                    batch=batch,
                    float_out=True,
                    segment_nnz=copy.segment_nnz,
                    rows=rows,
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
            samples = time_graph([work.run for work in works], repeats=case.repeats)
            note = f"{rows} rows a warp, {launches[0].block // 32} warps"
            yield gpu_record(
                case, f"endor {spec.codec} product, batch {batch}", samples, spec.nbytes, ceiling,
                note, packed_bytes=spec.nbytes,
            )  # fmt: skip


def _masked_scatter(
    case: GpuCase, weight: torch.Tensor, outs: Sequence[torch.Tensor], ceiling: BenchRecord
) -> Iterator[BenchRecord]:
    """torch's way, its mask already a bool tensor: a byte a weight."""
    mask, values = weight != 0, weight[weight != 0]
    traffic = mask.nbytes + values.nbytes + weight.nbytes

    def run() -> None:
        outs[0].zero_().masked_scatter_(mask, values)

    run()
    require_same(outs[0], weight, "masked_scatter_")
    samples = []
    for _ in range(5):
        torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        torch.cuda.synchronize()
        samples.append(time.perf_counter() - start)
    yield gpu_record(
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
        yield gpu_record(
            case, f"nvCOMP {algorithm}", samples, packed + weight.nbytes, ceiling, note,
            packed_bytes=packed, peer=True,
        )  # fmt: skip


def _ceiling(case: GpuCase, works: Sequence[Callable[[], object]], traffic: int) -> BenchRecord:
    return gpu_record(
        case, "copy in device memory", time_graph(works, repeats=case.repeats), traffic, None
    )
