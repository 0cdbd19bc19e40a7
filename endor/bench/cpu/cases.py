"""The weight that the CPU benchmarks share, and what they return."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np

from endor.bench.records import BenchRecord, environment
from endor.bench.timing import Subject, race
from endor.codecs import CodecChoice, DType, dtype
from endor.errors import ConfigError
from endor.kernels.dispatch import check_threads


@dataclass(frozen=True, slots=True)
class Case:
    """Settings of a benchmark on one weight.

    Attributes:
        rows, cols: Shape of the weight.
        density: Stored share of the elements, 0 < density <= 1.
        dtype: Safetensors code of a float type or of I8.
        codec: Codec under test; `"auto"` measures both `raw` and `exp`.
        threads: CPU threads for Endor and for the peers; None for all that this process may use.
        batch: Vectors per product (`matvec`).
        repeats: Timed runs per subject.
        budget_s: Seconds after which a slow subject is not repeated.
        peers: Whether to measure other people's code too.
        seed: Of the random weight.
    """

    rows: int = 4096
    cols: int = 11008
    density: float = 0.5
    dtype: str = "BF16"
    codec: CodecChoice = "auto"
    threads: int | None = None
    batch: int = 1
    repeats: int = 21
    budget_s: float = 8.0
    peers: bool = True
    seed: int = 0

    def quick(self) -> "Case":
        """Return the same case with few repeats, for a first look."""
        return replace(self, repeats=min(self.repeats, 5), budget_s=2.0)

    def check(self) -> DType:
        """Return the element type after checking every field.

        Raises:
            ConfigError: A field is out of range.
            DTypeError: Endor has no such element type.
        """
        for name in ("rows", "cols", "batch", "repeats"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.threads is not None:
            check_threads(self.threads)
        if not 0 < self.density <= 1:
            raise ConfigError(f"density must lie in (0, 1], got {self.density}")
        if self.codec == "dense":
            raise ConfigError("codec dense stores the tensor as it is: nothing to measure")
        item = dtype(self.dtype)
        if not item.packable:
            raise ConfigError(f"dtype {item.name} takes only the dense codec: nothing to measure")
        return item

    @property
    def codecs(self) -> tuple[CodecChoice, ...]:
        return ("raw", "exp") if self.codec == "auto" else (self.codec,)

    @property
    def thread_count(self) -> int:
        return self.threads or len(os.sched_getaffinity(0))


@dataclass(frozen=True, slots=True)
class BenchRun:
    """Records of one benchmark, and the peers that could not take part, with the reason."""

    records: tuple[BenchRecord, ...]
    missing: dict[str, str]


@dataclass(frozen=True, slots=True)
class Entry:
    """A subject and the bytes that its rates are computed from; see `BenchRecord`."""

    subject: Subject
    traffic_bytes: int
    dense_bytes: int = 0
    packed_bytes: int = 0
    note: str = ""


def weight(case: Case) -> np.ndarray:
    """Return Gaussian weights whose smallest magnitudes are zero, as unsigned bits `(rows, cols)`.

    Magnitude pruning, because it gives survivors the exponents that a pruned model has. The density
    is met up to ties at the threshold and survivors that round to zero.
    """
    import torch

    from endor.dtypes import torch_dtype
    from endor.packed import bits_of

    item = case.check()
    shape = (case.rows, case.cols)
    values = np.random.default_rng(case.seed).standard_normal(shape, dtype=np.float32)
    if item.name == "U8":
        np.abs(values, out=values)
    keep = round(case.density * values.size)
    if keep < values.size:
        sizes = np.abs(values).reshape(-1)
        threshold = np.partition(sizes, values.size - keep)[values.size - keep]
        values[np.abs(values) < threshold] = 0
    # Floats get a linear layer's usual scale; integers are spread over the byte.
    values *= 0.02 if item.signed else 30.0
    np.clip(values, -127, 127, out=values)
    bits = bits_of(torch.from_numpy(values).to(torch_dtype(item)))
    if item.signed:
        # A survivor that rounds to -0.0 is stored by us and dropped by every peer.
        bits[bits == item.uint.type(1 << (8 * item.itemsize - 1))] = 0
    return bits


def compare(
    case: Case,
    bench: str,
    ceiling: Entry,
    ours: Sequence[Entry],
    peers: Sequence[Entry],
    missing: dict[str, str],
) -> BenchRun:
    """Time the ceiling and our subjects in turn, then the peers, and return all records.

    Peers run after us: an OpenMP pool that still spins from the turn before would slow ours down.
    """
    subjects = [entry.subject for entry in (ceiling, *ours)]
    timings = race(subjects, repeats=case.repeats, budget_s=case.budget_s)
    with torch_threads(case.thread_count):
        subjects = [entry.subject for entry in peers]
        timings |= race(subjects, repeats=case.repeats, budget_s=case.budget_s)
    top = ceiling.subject.name
    ceiling_gbps = ceiling.traffic_bytes / timings[top].p50 / 1e9
    records = []
    for entry in (ceiling, *ours, *peers):
        name = entry.subject.name
        timing = timings[name]
        records.append(
            BenchRecord(
                bench=bench,
                subject=name,
                shape=(case.rows, case.cols),
                dtype=case.dtype,
                density=case.density,
                threads=case.thread_count,
                p20=timing.p20,
                p50=timing.p50,
                p80=timing.p80,
                repeats=len(timing.samples),
                traffic_bytes=entry.traffic_bytes,
                environment=environment(),
                dense_bytes=entry.dense_bytes,
                packed_bytes=entry.packed_bytes,
                ceiling=top,
                ceiling_gbps=ceiling_gbps,
                peer=entry in peers,
                note=entry.note,
            )
        )
    return BenchRun(tuple(records), missing)


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Let torch use `count` threads inside the block."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
