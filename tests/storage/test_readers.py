"""Readers: every byte in its place, or an error; never a half-filled buffer handed out."""

import errno
import fcntl
import gc
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from endor.codecs import DTYPES, Encoded, TensorSpec
from endor.errors import BackendError, ConfigError, ReadError, ShapeError, TruncatedError
from endor.storage import (
    ALIGN,
    FileLayout,
    FileWriter,
    HostBuffer,
    ReaderKind,
    Record,
    align_up,
    header_capacity,
    open_reader,
)

Write = Callable[..., Path]
BLOCK = 2 * ALIGN
U8 = DTYPES["U8"]


def noise(nbytes: int, seed: int) -> Encoded:
    data = np.random.default_rng(seed).integers(0, 256, nbytes, dtype=np.uint8)
    return Encoded(TensorSpec((nbytes,), U8, "dense", bitmap=False, nnz=nbytes), {"": data})


@pytest.fixture
def layout(write: Write) -> FileLayout:
    """A file of five records from one page to thirty."""
    sizes = (100, ALIGN, 5 * ALIGN + 1, 17 * ALIGN, 30 * ALIGN)
    return FileLayout.read(write({f"r{i}": {f"t{i}": noise(n, i)} for i, n in enumerate(sizes)}))


@pytest.fixture(params=["direct", "buffered"])
def kind(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "direct":
        probe = tmp_path / "probe"
        probe.write_bytes(bytes(ALIGN))
        try:
            os.close(os.open(probe, os.O_RDONLY | os.O_DIRECT))
        except OSError:
            pytest.skip("the temporary directory's file system has no O_DIRECT")
    return str(request.param)


def wanted(record: Record) -> np.ndarray:
    return np.fromfile(record.path, np.uint8, record.nbytes, offset=record.offset)


class Preadv:
    """`os.preadv` that does what `script` says on its first calls: an error, or a byte limit."""

    def __init__(self, *script: OSError | int | None) -> None:
        self.script = list(script)
        self.lock = threading.Lock()
        self.offsets: list[int] = []

    def __call__(self, fd: int, buffers: list[memoryview], offset: int) -> int:
        with self.lock:
            self.offsets.append(offset)
            step = self.script.pop(0) if self.script else None
        if isinstance(step, OSError):
            raise step
        count = os.preadv(fd, buffers, offset)
        if step is None:
            return count
        buffers[0][step:] = b"\xaa" * (len(buffers[0]) - step)
        return min(count, step)


def open_files(path: Path | None = None) -> int:
    """How many descriptors there are: of a file, or in all."""
    found = list(Path("/proc/self/fd").iterdir())
    return sum(path is None or os.path.realpath(fd) == str(path.resolve()) for fd in found)


def test_reads_every_record(layout: FileLayout, kind: ReaderKind) -> None:
    with open_reader(kind, block_bytes=BLOCK) as reader:
        for record in layout.records.values():
            buffer = HostBuffer(record.nbytes)
            stat = reader.read(record, buffer)
            np.testing.assert_array_equal(buffer.array, wanted(record))
            assert (stat.nbytes, stat.retries) == (record.nbytes, 0)
        report = reader.describe()
    assert report["requested"] == report["observed"] == kind
    assert report["bytes"] == sum(record.nbytes for record in layout.records.values())
    assert report["records"] == len(layout.records)
    assert report["reads"] == sum(-(-r.nbytes // BLOCK) for r in layout.records.values())
    assert report["seconds"] > 0
    assert report["cpu_s"] >= 0


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_reads_every_range(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    path = tmp_path_factory.getbasetemp() / "ranges.safetensors"
    if not path.exists():
        tensors = {f"t{i}": noise(n, i) for i, n in enumerate((9 * ALIGN + 5, 3 * ALIGN))}
        plan = {name: {name: encoded.spec} for name, encoded in tensors.items()}
        with FileWriter(path, header_capacity=header_capacity(plan)) as writer:
            for name, encoded in tensors.items():
                with writer.record(name) as out:
                    out.add(name, encoded)
    record = data.draw(st.sampled_from(list(FileLayout.read(path).records.values())))
    start = data.draw(st.integers(0, record.nbytes))
    stop = data.draw(st.integers(start, record.nbytes))
    buffer = HostBuffer(align_up(stop, ALIGN) - start // ALIGN * ALIGN)
    with open_reader("auto", block_bytes=ALIGN) as reader:
        found = reader.read_range(record, start, stop, buffer)
        np.testing.assert_array_equal(found, wanted(record)[start:stop])
        assert np.shares_memory(found, buffer.array) or start == stop


def test_many_threads_share_one_reader(layout: FileLayout, kind: ReaderKind) -> None:
    records = list(layout.records.values()) * 8

    def read(record: Record) -> bool:
        buffer = HostBuffer(record.nbytes)
        ticket = reader.submit(record, buffer)
        reader.wait(ticket)
        reader.wait(ticket)
        return bool((ticket.array == wanted(record)).all())

    with open_reader(kind, block_bytes=ALIGN) as reader, ThreadPoolExecutor(8) as pool:
        assert all(pool.map(read, records))
        assert reader.describe()["records"] == len(records)


@pytest.mark.parametrize(
    "script",
    [
        [ALIGN],
        [100],
        [ALIGN + 7, 1, ALIGN],
        [InterruptedError(errno.EINTR, "Interrupted")] * 3,
        [5, InterruptedError(errno.EINTR, "Interrupted"), 3 * ALIGN],
    ],
    ids=["one page", "100 bytes", "crumbs", "interrupted", "both"],
)
def test_short_and_interrupted_reads_are_repeated(
    layout: FileLayout, kind: ReaderKind, script: list[OSError | int]
) -> None:
    record = layout.records["r4"]
    preadv = Preadv(*script)
    buffer = HostBuffer(record.nbytes)
    with open_reader(kind, threads=1, block_bytes=1 << 20, preadv=preadv) as reader:
        stat = reader.read(record, buffer)
    np.testing.assert_array_equal(buffer.array, wanted(record))
    assert stat.retries == len(script)
    assert len(preadv.offsets) == len(script) + 1
    if kind == "direct":
        assert all(offset % ALIGN == 0 for offset in preadv.offsets)


def test_a_device_error_names_file_record_and_offset(layout: FileLayout, kind: ReaderKind) -> None:
    record = layout.records["r3"]
    error = OSError(errno.EIO, "Input/output error")
    buffer = HostBuffer(record.nbytes)
    with open_reader(kind, threads=2, block_bytes=BLOCK, preadv=Preadv(None, error)) as reader:
        ticket = reader.submit(record, buffer)
        with pytest.raises(ReadError, match="Input/output error") as caught:
            reader.wait(ticket)
        assert str(record.path) in str(caught.value)
        assert "'r3'" in str(caught.value)
        assert "offset" in str(caught.value)
        with pytest.raises(ReadError):
            _ = ticket.array
        assert ticket.done
        other = layout.records["r2"]
        reader.read(other, buffer)
        np.testing.assert_array_equal(buffer.array[: other.nbytes], wanted(other))


def test_a_failed_ticket_ends_only_when_no_thread_writes_any_more(layout: FileLayout) -> None:
    """The buffer may be used again the moment `wait` raises."""
    record = layout.records["r4"]
    inside, finish = threading.Event(), threading.Event()
    late: list[int] = []

    def preadv(fd: int, buffers: list[memoryview], offset: int) -> int:
        if offset == record.offset:
            inside.wait(10)
            raise OSError(errno.EIO, "Input/output error")
        inside.set()
        finish.wait(10)
        late.append(offset)
        return os.preadv(fd, buffers, offset)

    with open_reader("buffered", threads=2, block_bytes=BLOCK, preadv=preadv) as reader:
        ticket = reader.submit(record, HostBuffer(record.nbytes))
        inside.wait(10)
        while not reader.describe()["reads"]:  # until the failed block is over
            time.sleep(0.001)
        assert not ticket.done
        finish.set()
        with pytest.raises(ReadError):
            reader.wait(ticket)
        calls = len(late)
        assert calls == 1
    assert len(late) == calls


def test_truncated_before_the_read(layout: FileLayout, kind: ReaderKind) -> None:
    record = layout.records["r4"]
    os.truncate(record.path, record.offset + record.nbytes - 1)
    with open_reader(kind) as reader, pytest.raises(TruncatedError, match=r"has \d+ bytes, needs"):
        reader.submit(record, HostBuffer(record.nbytes))


@pytest.mark.parametrize("cut", [1, ALIGN, ALIGN + 1, 10 * ALIGN, 30 * ALIGN])
def test_truncated_in_the_middle_of_the_read(
    layout: FileLayout, kind: ReaderKind, cut: int
) -> None:
    record = layout.records["r4"]
    end = record.offset + record.nbytes

    def preadv(fd: int, buffers: list[memoryview], offset: int) -> int:
        os.truncate(record.path, end - cut)
        return os.preadv(fd, buffers, offset)

    with open_reader(kind, block_bytes=BLOCK, preadv=preadv) as reader:
        with pytest.raises(TruncatedError, match=r"truncated: has \d+ bytes, needs"):
            reader.read(record, HostBuffer(record.nbytes))
        with pytest.raises(TruncatedError):
            reader.read(record, HostBuffer(record.nbytes))


def test_a_read_without_progress_ends(layout: FileLayout) -> None:
    record = layout.records["r2"]

    def preadv(fd: int, buffers: list[memoryview], offset: int) -> int:
        return 1 if offset == record.offset else os.preadv(fd, buffers, offset)

    with open_reader("auto", preadv=preadv) as reader:
        if _has_direct(record.path):
            with pytest.raises(ReadError, match="no progress"):
                reader.read(record, HostBuffer(record.nbytes))
        else:
            reader.read(record, HostBuffer(record.nbytes))


def _has_direct(path: Path) -> bool:
    try:
        os.close(os.open(path, os.O_RDONLY | os.O_DIRECT))
    except OSError:
        return False
    return True


def test_auto_falls_back_when_the_first_read_is_refused(layout: FileLayout) -> None:
    record = layout.records["r4"]
    buffer = HostBuffer(record.nbytes)
    refused = OSError(errno.EINVAL, "Invalid argument")
    refusals: list[int] = []

    def preadv(fd: int, buffers: list[memoryview], offset: int) -> int:
        if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT:
            refusals.append(offset)
            raise refused
        return os.preadv(fd, buffers, offset)

    with open_reader("auto", block_bytes=BLOCK, preadv=preadv) as reader:
        reader.read(record, buffer)
        np.testing.assert_array_equal(buffer.array, wanted(record))
        report = reader.describe()
    assert report["requested"] == "auto"
    assert report["observed"] == "buffered"
    if _has_direct(record.path):
        assert refusals
        assert "O_DIRECT read gives 'Invalid argument'" in report["reason"]


def _open_without_direct(path: Path, flags: int, *rest: int) -> int:
    if flags & os.O_DIRECT:
        raise OSError(errno.EINVAL, "Invalid argument", str(path))
    return _OPEN(path, flags, *rest)


_OPEN = os.open


def test_auto_falls_back_when_the_opening_is_refused(
    layout: FileLayout, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "open", _open_without_direct)
    record = layout.records["r1"]
    with open_reader("auto") as reader:
        reader.read(record, HostBuffer(record.nbytes))
        report = reader.describe()
    assert report["observed"] == "buffered"
    assert "O_DIRECT open gives 'Invalid argument'" in report["reason"]


def test_forced_direct_never_falls_back(
    layout: FileLayout, kind: ReaderKind, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = layout.records["r1"]
    if kind == "direct":
        preadv = Preadv(OSError(errno.EINVAL, "Invalid argument"))
        with (
            open_reader("direct", preadv=preadv) as reader,
            pytest.raises(BackendError, match="'direct' cannot run"),
        ):
            reader.read(record, HostBuffer(record.nbytes))
    monkeypatch.setattr(os, "open", _open_without_direct)
    with open_reader("direct") as reader, pytest.raises(BackendError, match="'direct' cannot run"):
        reader.submit(record, HostBuffer(record.nbytes))


def test_a_late_refusal_is_an_error_not_a_fallback(layout: FileLayout) -> None:
    record = layout.records["r4"]
    if not _has_direct(record.path):
        pytest.skip("the temporary directory's file system has no O_DIRECT")
    preadv = Preadv(None, OSError(errno.EINVAL, "Invalid argument"))
    with (
        open_reader("auto", threads=1, block_bytes=BLOCK, preadv=preadv) as reader,
        pytest.raises(ReadError, match="Invalid argument"),
    ):
        reader.wait(reader.submit(record, HostBuffer(record.nbytes)))


def test_close_cancels_what_waits_and_ends_the_threads(layout: FileLayout) -> None:
    records = list(layout.records.values())
    inside, finish = threading.Event(), threading.Event()

    def preadv(fd: int, buffers: list[memoryview], offset: int) -> int:
        inside.set()
        finish.wait(10)
        return os.preadv(fd, buffers, offset)

    before = threading.active_count()
    fds = open_files()
    reader = open_reader("auto", threads=1, preadv=preadv)
    tickets = [reader.submit(record, HostBuffer(record.nbytes)) for record in records]
    inside.wait(10)
    closer = threading.Thread(target=reader.close)
    closer.start()
    tickets[-1].settle()
    finish.set()
    closer.join()
    for ticket in tickets:
        assert ticket.done
        with pytest.raises(ReadError, match="closed"):
            reader.wait(ticket)
    assert threading.active_count() == before
    assert open_files() == fds
    reader.close()
    with pytest.raises(ReadError, match="closed"):
        reader.submit(records[0], HostBuffer(records[0].nbytes))


def test_a_forgotten_reader_gives_its_files_back(layout: FileLayout) -> None:
    record = layout.records["r0"]
    reader = open_reader()
    reader.read(record, HostBuffer(record.nbytes))
    assert open_files(record.path) == 1
    del reader
    gc.collect()
    assert open_files(record.path) == 0


def test_a_missing_file(layout: FileLayout) -> None:
    record = layout.records["r0"]
    record.path.unlink()
    with open_reader() as reader, pytest.raises(FileNotFoundError):
        reader.submit(record, HostBuffer(record.nbytes))


def test_bad_buffers_and_ranges(layout: FileLayout) -> None:
    record = layout.records["r2"]
    good = HostBuffer(record.nbytes + ALIGN).array
    frozen = good[: record.nbytes].view()
    frozen.flags.writeable = False
    with open_reader() as reader:
        for bad in (
            good[: record.nbytes - 1],
            good[1 : record.nbytes + 1],
            good.view(np.uint16),
            good.reshape(2, -1),
            good[::2],
            frozen,
        ):
            with pytest.raises(ShapeError, match="buffer must be flat writable u8"):
                reader.submit(record, bad)
        for start, stop in ((-1, 5), (6, 5), (0, record.nbytes + 1)):
            with pytest.raises(ShapeError, match="range must lie in"):
                reader.submit(record, good, start=start, stop=stop)


def test_bad_options() -> None:
    with pytest.raises(ConfigError, match="reader must be one of"):
        open_reader("mmap")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="threads"):
        open_reader(threads=0)
    for block_bytes in (0, 100, ALIGN + 1, 1 << 31):
        with pytest.raises(ConfigError, match="block_bytes"):
            open_reader(block_bytes=block_bytes)


@pytest.mark.parametrize("nbytes", [0, 1, ALIGN, ALIGN + 1, (2 << 20) + 5])
def test_host_buffers_are_aligned_and_zero(nbytes: int) -> None:
    buffer = HostBuffer(nbytes)
    assert buffer.array.size == buffer.nbytes == nbytes
    assert buffer.address % ALIGN == 0
    assert not buffer.array.any()
    view = buffer.array[: nbytes // 2]
    del buffer
    gc.collect()
    assert not view.any()


def test_a_buffer_of_negative_size() -> None:
    with pytest.raises(ShapeError):
        HostBuffer(-1)
