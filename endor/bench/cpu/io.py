"""Reading a packed file: our readers against plain O_DIRECT, plain reads and safetensors.

Cold means that no page of the file is in the page cache, which is asked of the kernel and checked
with mincore before every run; warm means that all are.
"""

import ctypes
import mmap
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from safetensors import safe_open

from endor.bench.cpu.cases import BenchRun
from endor.bench.records import BenchRecord, environment
from endor.bench.timing import Subject, race
from endor.codecs import Encoded, TensorSpec, dtype, encode
from endor.errors import BackendError, ConfigError, ReadError
from endor.storage import (
    FileLayout,
    FileWriter,
    HostBuffer,
    Record,
    RecordReader,
    header_capacity,
    open_reader,
)

Pass = Callable[[int], object]

BLOCK_BYTES = 4 << 20
CEILING = "raw O_DIRECT"


@dataclass(frozen=True, slots=True)
class IoCase:
    """Settings of the read benchmark.

    Attributes:
        directory: Where the temporary file goes: the disk under test.
        file_bytes: Its size.
        record_bytes: Size of each record: one linear layer's.
        threads: Reader threads.
        repeats: Timed passes over the file per subject, cold and warm each.
        budget_s: Seconds after which a slow subject is not repeated.
        peers: Whether to measure safetensors too.
    """

    directory: Path
    file_bytes: int = 1 << 30
    record_bytes: int = 32 << 20
    threads: int = 4
    repeats: int = 7
    budget_s: float = 10.0
    peers: bool = True

    def check(self) -> None:
        """Raise `ConfigError` unless the sizes make sense."""
        if self.threads < 1 or self.repeats < 1:
            raise ConfigError("threads and repeats must be at least 1")
        if not mmap.PAGESIZE <= self.record_bytes <= self.file_bytes:
            raise ConfigError(
                f"record_bytes must lie between a page and file_bytes {self.file_bytes}, "
                f"got {self.record_bytes}"
            )


def io(case: IoCase) -> BenchRun:
    """Measure passes over a temporary packed file, cold and warm.

    Every subject delivers the file's records into one reused buffer, as the loader does. The
    ceiling is `case.threads` threads of O_DIRECT reads of 4 MiB, in the same state.

    Raises:
        ConfigError: A size makes no sense.
        BackendError: A reader delivered wrong bytes.
        OSError: The disk is full or not writable.
    """
    case.check()
    with TemporaryDirectory(prefix="endor-bench-", dir=case.directory) as scratch:
        path = Path(scratch) / "bench.safetensors"
        _write(path, case)
        return _measure(path, case)


def resident_share(path: Path) -> float:
    """Return the share of the file's pages that the page cache holds."""
    size = path.stat().st_size
    with path.open("rb") as file, mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ) as pages:
        view = np.frombuffer(pages, np.uint8)
        flags = np.zeros(-(-size // mmap.PAGESIZE), np.uint8)
        libc = ctypes.CDLL(None, use_errno=True)
        answer = libc.mincore(
            ctypes.c_void_p(view.ctypes.data),
            ctypes.c_size_t(size),
            ctypes.c_void_p(flags.ctypes.data),
        )
        del view
        if answer:
            raise OSError(ctypes.get_errno(), "mincore failed", str(path))
    return float((flags & 1).mean())


def drop_cache(path: Path) -> None:
    """Ask the kernel to forget the file's pages."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)


def _write(path: Path, case: IoCase) -> None:
    count = max(1, case.file_bytes // case.record_bytes)
    # A little below the record's size, so that the tail of the record does not add a page.
    elements = case.record_bytes - 256
    item = dtype("U8")
    spec = TensorSpec((elements,), item, "dense", bitmap=False, nnz=elements)
    names = [f"layers.{place}.weight" for place in range(count)]
    generator = np.random.default_rng(0)
    capacity = header_capacity({name: {name: spec} for name in names})
    with FileWriter(path, header_capacity=capacity) as writer:
        for name in names:
            bits = generator.integers(256, size=elements, dtype=np.uint8)
            encoded: Encoded = encode(bits, item, codec="dense")
            with writer.record(name) as record:
                record.add(name, encoded)


def _measure(path: Path, case: IoCase) -> BenchRun:
    layout = FileLayout.read(path)
    records = list(layout.records.values())
    buffer = HostBuffer(max(record.nbytes for record in records))
    missing: dict[str, str] = {}
    passes: dict[str, Pass] = {}
    closers: list[Callable[[], object]] = []
    peers = ("safetensors safe_open",)
    try:
        try:
            fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
            os.preadv(fd, [buffer.array[: mmap.PAGESIZE].data], 0)
            closers.append(lambda: os.close(fd))
            passes[CEILING] = lambda _: _threaded(fd, records, buffer, case.threads)
        except OSError as error:
            missing[CEILING] = f"{error.strerror} in {path.parent}"
        plain = os.open(path, os.O_RDONLY)
        closers.append(lambda: os.close(plain))
        passes["plain preadv, 1 thread"] = lambda _: _threaded(plain, records, buffer, 1)
        for kind in ("direct", "buffered"):
            try:
                reader = open_reader(kind, threads=case.threads, block_bytes=BLOCK_BYTES)
                closers.append(reader.close)
                one = _through(reader, records, buffer)
                one(0)
            except BackendError as error:
                missing[f"endor {kind}"] = str(error)
            else:
                _check(path, records[-1], buffer, kind)
                passes[f"endor {kind}"] = one
        if case.peers:
            passes[peers[0]] = lambda _: _safe_open(path, buffer)
        found: list[BenchRecord] = []
        for state in ("cold", "warm"):
            found += _race(path, state, passes, peers, case)
    finally:
        for close in closers:
            close()
    return BenchRun(tuple(found), missing)


def _race(
    path: Path,
    state: str,
    passes: dict[str, Pass],
    peers: tuple[str, ...],
    case: IoCase,
) -> list[BenchRecord]:
    left = [0.0]

    def prepare(_: int) -> None:
        if state == "cold":
            drop_cache(path)
            left[0] = max(left[0], resident_share(path))
        else:
            _warm(path)

    subjects = [Subject(name, run, prepare) for name, run in passes.items()]
    timings = race(subjects, repeats=case.repeats, budget_s=case.budget_s)
    size = path.stat().st_size
    top = timings.get(CEILING)
    note = f"{left[0]:.0%} was still cached" if left[0] > 0.01 else ""
    return [
        BenchRecord(
            bench="io",
            subject=f"{name}, {state}",
            shape=(size,),
            dtype="U8",
            density=1.0,
            threads=case.threads,
            p20=timing.p20,
            p50=timing.p50,
            p80=timing.p80,
            repeats=len(timing.samples),
            traffic_bytes=size,
            environment=environment(),
            ceiling=CEILING if top else "",
            ceiling_gbps=size / top.p50 / 1e9 if top else 0.0,
            peer=name in peers,
            note=note,
        )
        for name, timing in timings.items()
    ]


def _through(reader: RecordReader, records: list[Record], buffer: HostBuffer) -> Pass:
    def run(_: int) -> None:
        for record in records:
            reader.read(record, buffer)

    return run


def _safe_open(path: Path, buffer: HostBuffer) -> None:
    """Read what a user of safetensors would: each tensor, copied into the ready buffer."""
    with safe_open(path, framework="numpy") as file:
        for key in file.keys():  # noqa: SIM118 - not a mapping
            values = file.get_tensor(key)
            buffer.array[: values.nbytes] = values


def _check(path: Path, record: Record, buffer: HostBuffer, kind: str) -> None:
    expected = np.fromfile(path, np.uint8, record.nbytes, offset=record.offset)
    if not np.array_equal(buffer.array[: record.nbytes], expected):
        raise BackendError(f"endor {kind}: wrong bytes in record {record.name}; please report this")


def _warm(path: Path) -> None:
    """Bring the whole file into the page cache."""
    if resident_share(path) < 1:
        scratch = bytearray(BLOCK_BYTES)
        with path.open("rb", buffering=0) as file:
            while file.readinto(scratch):
                pass


def _threaded(fd: int, records: list[Record], buffer: HostBuffer, threads: int) -> None:
    """Read every record into `buffer`, its blocks spread over `threads` threads."""

    def block(place: int, start: int, stop: int) -> None:
        while start < stop:
            count = os.preadv(fd, [buffer.array[start:stop].data], place + start)
            if count == 0:
                raise ReadError(f"the benchmark's file ended early, at byte {place + start}")
            start += count

    with ThreadPoolExecutor(threads) as pool:
        for record in records:
            starts = range(0, record.nbytes, BLOCK_BYTES)
            jobs = [
                pool.submit(block, record.offset, at, min(at + BLOCK_BYTES, record.nbytes))
                for at in starts
            ]
            for job in jobs:
                job.result()
