"""Short measurements of this machine: what one core, its memory, a disk and a GPU link can do.

Each probe takes well under a second and returns medians; the whole set takes about ten. Rates are
in GB/s (10^9 bytes a second). A rate over weights counts the bytes named in its docstring, so that
`bytes / rate` is seconds.
"""

import os
import resource
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import torch

from endor import kernels
from endor.codecs import DTYPES, Encoded
from endor.dtypes import torch_dtype
from endor.errors import DTypeError
from endor.packed import bits_of, plain_matrix
from endor.planning.others import Others, OthersOnDisk
from endor.planning.request_probe import REQUEST_BYTES, request_seconds
from endor.storage.buffers import HostBuffer
from endor.storage.checksum import checksum

TORCH_TYPES = {name: torch_dtype(DTYPES[name]) for name in ("BF16", "F16", "F32")}
READ_THREADS = 4
READ_BYTES = 4 << 20
ROWS, COLS = 4096, 4096
DENSITY = 0.5
WORKING_SET = 256 << 20
"""Bytes that a probe of main memory goes through, so that caches do not answer."""
MOST_COPIES = 256
PROBE_S = 0.2
"""Seconds of one of many probes."""
FURTHER_ROWS = 8
WIDE_ROWS = 64


def median_seconds(work: Callable[[], object], *, least: int = 5, budget_s: float = 0.4) -> float:
    """Return the median time of `work()`: at least `least` calls, about `budget_s` in all."""
    work()
    times: list[float] = []
    end = time.perf_counter() + budget_s
    while len(times) < least or (time.perf_counter() < end and len(times) < 1000):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def sample_weights(dtype: str, rows: int, cols: int, density: float) -> np.ndarray:
    """Return the bits of a magnitude-pruned normal matrix, `(rows, cols)`, unsigned."""
    if dtype not in TORCH_TYPES:
        raise DTypeError(f"probe: dtype must be one of {', '.join(TORCH_TYPES)}, got {dtype}")
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, cols, generator=generator) * 0.02
    if density < 1:
        sample = weight.flatten()[: 1 << 16].abs()
        weight[weight.abs() < torch.quantile(sample, 1 - density)] = 0
    item = DTYPES[dtype]
    bits = weight.to(TORCH_TYPES[dtype]).contiguous().view(torch.uint8).numpy()
    return bits.reshape(-1).view(item.uint).reshape(rows, cols)


def sample_codes(rows: int, cols: int) -> np.ndarray:
    """Return integer codes of about 3.5 bits of entropy."""
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(rows, cols, generator=generator) * 2.75).round().int().numpy()


def samples(dtype: str, *, rows: int, cols: int) -> dict[str, Encoded]:
    """Return one encoded matrix per kind of stored tensor, keyed as `costs.kind_of` does."""
    pruned = sample_weights(dtype, rows, cols, DENSITY)
    whole = sample_weights(dtype, rows, cols, 1.0)
    item = DTYPES[dtype]
    return {
        "raw+bitmap": kernels.encode(pruned, item, codec="raw"),
        "exp+bitmap": kernels.encode(pruned, item, codec="exp", bitmap=True),
        "exp": kernels.encode(whole, item, codec="exp", bitmap=False),
        "int": kernels.integer.encode(sample_codes(rows, cols), 0.01, item),
    }


def memory(threads: int, nbytes: int = WORKING_SET) -> dict[str, float]:
    """Return `copy_gbps` (bytes copied, counted once) and `read_gbps` of main memory.

    `checksum_gbps` is what one thread checks.
    """
    source, target = np.ones(nbytes, np.uint8), np.empty(nbytes, np.uint8)
    copy_s = median_seconds(lambda: kernels.probe_copy(target, source, threads))
    read_s = median_seconds(lambda: kernels.probe_read(source, threads))
    check_s = median_seconds(lambda: checksum(source.data), budget_s=PROBE_S)
    seconds = {"copy_gbps": copy_s, "read_gbps": read_s, "checksum_gbps": check_s}
    return {name: nbytes / each / 1e9 for name, each in seconds.items()}


def codecs(dtype: str, threads: int, *, rows: int = ROWS, cols: int = COLS) -> dict[str, Any]:
    """Return the rates of expansions and packed products by kind.

    `expand_gbps` counts dense bytes written, `product_gbps` packed bytes read at batch 1; `small_*`
    are the same of a matrix an eighth as high and a quarter as wide; `product_row_cost` is what
    each further row adds to a product, as a share of the first.
    """
    found: dict[str, dict[str, float]] = {}
    for prefix, height, width in (("", rows, cols), ("small_", max(8, rows // 8), cols // 4)):
        for kind, encoded in samples(dtype, rows=height, cols=width).items():
            rates = _codec(dtype, encoded, threads, with_rows=not prefix)
            for name, value in rates.items():
                found.setdefault(prefix * (name != "product_row_cost") + name, {})[kind] = value
    return found


def _codec(dtype: str, encoded: Encoded, threads: int, *, with_rows: bool) -> dict[str, float]:
    """Return the rates of one encoded matrix."""
    spec = encoded.spec
    height, width = spec.shape
    turns = cycle(copies(encoded))
    out = np.empty(spec.numel, spec.dtype.uint)
    expand_s = median_seconds(
        lambda: kernels.decode(next(turns), out, threads=threads), budget_s=PROBE_S
    )

    def product_s(batch: int) -> float:
        x = sample_weights(dtype, batch, width, 1.0)
        y = np.empty((batch, height), np.float32)
        return median_seconds(
            lambda: kernels.matvec(next(turns), x, y, threads=threads), budget_s=PROBE_S
        )

    one = product_s(1)
    rates = {
        "expand_gbps": spec.dense_nbytes / expand_s / 1e9,
        "product_gbps": spec.nbytes / one / 1e9,
    }
    if with_rows:
        further = (product_s(FURTHER_ROWS) / one - 1) / (FURTHER_ROWS - 1)
        rates["product_row_cost"] = max(further, 0.01)
    return rates


def copies(encoded: Encoded) -> list[Encoded]:
    """Return as many copies as fill `WORKING_SET`: one alone would stay in the last-level cache.

    A decode step of a model meets every weight once and finds none of them there.
    """
    count = min(MOST_COPIES, -(-WORKING_SET // encoded.spec.nbytes))
    return [
        Encoded(encoded.spec, {name: array.copy() for name, array in encoded.arrays.items()})
        for _ in range(count)
    ]


def linear(
    dtype: str, *, rows: int = ROWS, cols: int = 2 * COLS, batch: int = 256
) -> dict[str, Any]:
    """Return torch's dense product: `linear_gbps` (weight bytes, batch 1) and `gemm_gflops`.

    `small_linear_gbps` is that of a small matrix; `float32_gflops` of `WIDE_ROWS` rows in float32,
    on a panel that `widen_gbps` (bytes of `dtype`) made.
    `plain_gbps` is the rate of Endor's own product with the same matrix, and `plain_row_cost` what
    each further row adds to it, as a share of the first.
    `op_us` is the time of one small elementwise operation: what the rest of a layer is made of.
    """
    kind = TORCH_TYPES[dtype]
    weight = (torch.randn(rows, cols) * 0.02).to(kind)
    # Several, so that no cache answers: see `copies`.
    several = min(MOST_COPIES, max(1, WORKING_SET // weight.nbytes))
    weights = cycle([weight, *(weight.clone() for _ in range(several - 1))])
    vector, matrix = torch.randn(1, cols).to(kind), torch.randn(batch, cols).to(kind)
    row = torch.randn(1, 1, cols).to(kind)
    linear = torch.nn.functional.linear
    small = (torch.randn(max(8, rows // 8), max(8, cols // 8)) * 0.02).to(kind)
    count = min(MOST_COPIES, -(-WORKING_SET // small.nbytes))
    smalls = cycle([small.clone() for _ in range(count)])
    short = torch.randn(1, small.shape[1]).to(kind)
    panel = torch.randn(max(8, rows // 4), max(8, cols // 8))
    narrow, many = panel.to(kind), torch.randn(WIDE_ROWS, panel.shape[1])
    with torch.inference_mode():
        linear_s = median_seconds(lambda: linear(vector, next(weights)))
        small_s = median_seconds(lambda: linear(short, next(smalls)), budget_s=PROBE_S)
        gemm_s = median_seconds(lambda: linear(matrix, weight), least=3)
        op_s = median_seconds(lambda: row * row, budget_s=0.1)
        wide_s = median_seconds(lambda: linear(many, panel), budget_s=PROBE_S)
        widen_s = median_seconds(lambda: panel.copy_(narrow), budget_s=PROBE_S)
    plains = cycle([plain_matrix(next(weights)) for _ in range(several)])

    def plain_s(batch: int) -> float:
        x = bits_of(vector.repeat(batch, 1))
        y = np.empty((batch, rows), np.float32)
        return median_seconds(lambda: kernels.matvec(next(plains), x, y), budget_s=PROBE_S)

    one_s = plain_s(1)
    further = (plain_s(FURTHER_ROWS) / one_s - 1) / (FURTHER_ROWS - 1)
    return {
        "linear_gbps": weight.nbytes / linear_s / 1e9,
        "small_linear_gbps": small.nbytes / small_s / 1e9,
        "gemm_gflops": 2 * batch * rows * cols / gemm_s / 1e9,
        "float32_gflops": 2 * WIDE_ROWS * panel.numel() / wide_s / 1e9,
        "widen_gbps": narrow.nbytes / widen_s / 1e9,
        "plain_gbps": weight.nbytes / one_s / 1e9,
        "plain_row_cost": max(further, 0.01),
        "op_us": op_s * 1e6,
    }


def disk(path: Path, *, limit_bytes: int = 512 << 20, passes: int = 3) -> dict[str, Any]:
    """Return the cold read rate of the file at `path`: `read_gbps`, `cpu_s_per_gb`, `direct`,
    `request_us`, what each further request costs, and `scattered_gbps`, the rate of their bytes.

    Reads as the engine does: a few threads, 4 MiB each, past the page cache when the filesystem
    takes O_DIRECT. Each pass reads another stretch of the file; the median pass counts.
    `disturbed` is what others had of one processor meanwhile or, past the page cache, of the disk.
    """
    size = path.stat().st_size // READ_BYTES * READ_BYTES
    stretch = min(limit_bytes, max(size // passes // READ_BYTES, 1) * READ_BYTES)
    rates: list[float] = []
    cpu: list[float] = []
    fd, direct = _open_direct(path)
    others, moving, own = Others(1), OthersOnDisk(path), 0
    try:
        with ThreadPoolExecutor(READ_THREADS) as pool:
            for number in range(passes):
                begin = number * stretch if (number + 1) * stretch <= size else 0
                if not direct:
                    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
                before, start = _cpu_seconds(), time.perf_counter()
                nbytes = _read(pool, fd, begin, stretch)
                own += nbytes
                rates.append(nbytes / max(time.perf_counter() - start, 1e-9) / 1e9)
                cpu.append((_cpu_seconds() - before) / max(nbytes / 1e9, 1e-9))
            disturbed = max(others.share(), moving.share(own) if direct else 0.0)
            if not direct:
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            size = path.stat().st_size
            small_s, larger_s = (
                request_seconds(pool, READ_THREADS, fd, size, nbytes) for nbytes in REQUEST_BYTES
            )
    finally:
        os.close(fd)
    read_gbps = statistics.median(rates)
    # as of a line through both; what no disk is, faster than reads of long stretches, is noise
    gained = (REQUEST_BYTES[1] - REQUEST_BYTES[0]) / max(larger_s - small_s, 1e-9) / 1e9
    scattered_gbps = min(gained, read_gbps)
    return {
        "read_gbps": read_gbps,
        "slowest_gbps": min(rates),
        "fastest_gbps": max(rates),
        "cpu_s_per_gb": statistics.median(cpu),
        "direct": direct,
        "request_us": max(small_s * 1e6 - REQUEST_BYTES[0] / scattered_gbps / 1e3, 0.1),
        "scattered_gbps": scattered_gbps,
        "disturbed": round(disturbed, 3),
    }


def read_files(paths: Sequence[Path], nbytes: int) -> int:
    """Read the first `nbytes` of the files, one by one, as `disk` does; return the bytes read."""
    done = 0
    with ThreadPoolExecutor(READ_THREADS) as pool:
        for path in paths:
            if done >= nbytes:
                break
            fd, _ = _open_direct(path)
            try:
                done += _read(pool, fd, 0, min(nbytes - done, path.stat().st_size))
            finally:
                os.close(fd)
    return done


def _open_direct(path: Path) -> tuple[int, bool]:
    """Return a descriptor, and whether it goes past the page cache."""
    try:
        return os.open(path, os.O_RDONLY | os.O_DIRECT), True
    except OSError:
        return os.open(path, os.O_RDONLY), False


def _read(pool: ThreadPoolExecutor, fd: int, begin: int, nbytes: int) -> int:
    jobs = [pool.submit(_read_stripe, fd, begin, nbytes, worker) for worker in range(READ_THREADS)]
    return sum(job.result() for job in jobs)


def _read_stripe(fd: int, begin: int, nbytes: int, worker: int) -> int:
    """Read every `READ_THREADS`-th block of `[begin, begin + nbytes)`; return the bytes read."""
    done = 0
    # The engine's own kind of memory: scattered small pages would halve the rate.
    block = HostBuffer(READ_BYTES)
    for offset in range(worker * READ_BYTES, nbytes, READ_THREADS * READ_BYTES):
        done += os.preadv(fd, [block.array.data], begin + offset)
    return done


def _cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def cuda(device: int = 0) -> dict[str, Any]:
    """Return the link and the memory of a CUDA device; needs one.

    `h2d_gbps` is the pinned host-to-device rate of 64 MiB copies, `copy_us` the cost of a tiny one,
    `hbm_gbps` the rate of device-to-device copies (read and write counted), `launch_us` one kernel.
    """
    target = torch.device("cuda", device)
    host = torch.empty(64 << 20, dtype=torch.uint8, pin_memory=True)
    near, far = (torch.empty(64 << 20, dtype=torch.uint8, device=target) for _ in range(2))

    def timed(work: Callable[[], object], inner: int) -> float:
        def run() -> None:
            for _ in range(inner):
                work()
            torch.cuda.synchronize(target)

        return median_seconds(run) / inner

    weight = torch.randn(4096, 4096, device=target, dtype=torch.bfloat16)
    matrix = torch.randn(2048, 4096, device=target, dtype=torch.bfloat16)
    small = torch.ones(8, device=target)
    gemm_s = timed(lambda: torch.nn.functional.linear(matrix, weight), 4)
    properties = torch.cuda.get_device_properties(target)
    return {
        "name": properties.name,
        "vram_bytes": properties.total_memory,
        "h2d_gbps": host.nbytes / timed(lambda: near.copy_(host, non_blocking=True), 4) / 1e9,
        "copy_us": timed(lambda: near[:4096].copy_(host[:4096], non_blocking=True), 64) * 1e6,
        "hbm_gbps": 2 * near.nbytes / timed(lambda: far.copy_(near), 8) / 1e9,
        "launch_us": timed(lambda: small.add_(1), 64) * 1e6,
        "gemm_gflops": 2 * 2048 * 4096 * 4096 / gemm_s / 1e9,
    }
