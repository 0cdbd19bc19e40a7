"""Parts of a record, each read to its own place: all at once or by threads, before reads ahead."""

import os
import threading
import time

import numpy as np
import pytest

from endor import codecs
from endor.codecs import DTYPES
from endor.errors import ReadError, TruncatedError
from endor.storage import FileLayout, HostBuffer, Record, at_once, open_reader, scattered
from endor.storage.scattered import read_spans
from endor.storage.turns import PIECE_BYTES

from .conftest import Write


@pytest.fixture
def record(write: Write) -> Record:
    """Return a record of about 3 MiB."""
    bits = np.random.default_rng(1).integers(1, 1 << 16, (600, 2600)).astype(np.uint16)
    path = write({"x": {"x": codecs.encode(bits, DTYPES["BF16"], codec="raw")}})
    return FileLayout.read(path).records["x"]


def spans_of(record: Record, seed: int, count: int) -> list[tuple[int, int]]:
    """Return some of the record's blocks, ascending and apart."""
    rng = np.random.default_rng(seed)
    edges = np.sort(rng.choice(record.nbytes // 4096 + 1, 2 * count, replace=False)) * 4096
    return [(int(a), int(b)) for a, b in edges.reshape(-1, 2)]


def assert_read(record: Record, data: np.ndarray, spans: list[tuple[int, int]]) -> None:
    """Check that exactly the spans came; the rest of `data` was 7."""
    wanted = np.full(record.nbytes, 7, dtype=np.uint8)
    raw = np.frombuffer(record.path.read_bytes(), np.uint8)[record.offset :]
    for start, stop in spans:
        wanted[start:stop] = raw[start:stop]
    assert np.array_equal(data[: record.nbytes], wanted)


def buffer_of(record: Record) -> HostBuffer:
    buffer = HostBuffer(record.nbytes)
    buffer.array[...] = 7
    return buffer


@pytest.mark.parametrize("kind", ["auto", "buffered"])
@pytest.mark.parametrize("count", [0, 1, 2, 190, 300])
def test_spans_come_to_their_places(record: Record, kind: str, count: int) -> None:
    """300 are more than are on their way at once."""
    with open_reader(kind) as reader:  # type: ignore[arg-type]
        for seed in range(3):
            buffer, spans = buffer_of(record), spans_of(record, seed, count)
            stat = read_spans(reader, record, spans, buffer)
            assert_read(record, buffer.array, spans)
            assert stat.nbytes == sum(stop - start for start, stop in spans)


def test_where_the_system_takes_no_reads_at_once_threads_read(
    record: Record, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scattered, "read_at_once", lambda *given: None)
    with open_reader() as reader:
        buffer, spans = buffer_of(record), spans_of(record, 4, 50)
        read_spans(reader, record, spans, buffer)
        assert_read(record, buffer.array, spans)


@pytest.mark.parametrize("result", [-5, -11, 0, 512])
def test_what_did_not_come_whole_is_read_again(
    record: Record, monkeypatch: pytest.MonkeyPatch, result: int
) -> None:
    real = at_once.read_at_once

    def some(fd: int, offsets: np.ndarray, lengths: np.ndarray, addresses: np.ndarray) -> object:
        found = real(fd, offsets[::2], lengths[::2], addresses[::2])
        if found is None:
            pytest.skip("this system takes no reads at once")
        out = np.full(len(offsets), result, dtype=np.int64)
        out[::2] = found
        return out

    monkeypatch.setattr(scattered, "read_at_once", some)
    with open_reader() as reader:
        buffer, spans = buffer_of(record), spans_of(record, 5, 31)
        stat = read_spans(reader, record, spans, buffer)
        assert_read(record, buffer.array, spans)
        assert stat.retries in (0, 15)  # none where the file system refuses O_DIRECT


def test_a_file_that_was_cut_is_an_error(record: Record) -> None:
    with open_reader() as reader:
        spans = spans_of(record, 6, 40)
        read_spans(reader, record, spans, buffer_of(record))
        os.truncate(record.path, record.offset + spans[-1][0])
        with pytest.raises(TruncatedError, match="truncated"):
            read_spans(reader, record, spans, buffer_of(record))


def test_a_closed_reader_refuses(record: Record) -> None:
    reader = open_reader()
    reader.close()
    with pytest.raises(ReadError, match="closed"):
        read_spans(reader, record, [(0, 4096)], buffer_of(record))


def test_several_threads_read_at_once(record: Record) -> None:
    failures: list[BaseException] = []

    def some(seed: int) -> None:
        try:
            for turn in range(20):
                buffer, spans = buffer_of(record), spans_of(record, 100 * seed + turn, 60)
                read_spans(reader, record, spans, buffer)
                assert_read(record, buffer.array, spans)
        except BaseException as error:
            failures.append(error)

    with open_reader() as reader:
        threads = [threading.Thread(target=some, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not failures


@pytest.mark.parametrize("kind", ["auto", "buffered"])
def test_reads_ahead_wait_while_parts_are_read(record: Record, kind: str) -> None:
    assert record.nbytes > 2 * PIECE_BYTES
    with open_reader(kind) as reader:  # type: ignore[arg-type]
        buffer = buffer_of(record)
        with reader.turns.first():
            with reader.turns.first():
                ticket = reader.submit(record, buffer)
            assert not ticket.done
            assert (buffer.array == 7).all()
        reader.wait(ticket)
        assert_read(record, buffer.array, [(0, record.nbytes)])


def test_a_reader_closes_while_reads_ahead_wait(record: Record) -> None:
    reader, buffer = open_reader(), buffer_of(record)
    with reader.turns.first():
        ticket = reader.submit(record, buffer)
        closing = threading.Thread(target=reader.close)
        closing.start()
        while not reader._closed:
            time.sleep(0.001)
    closing.join()
    with pytest.raises(ReadError, match="closed"):
        reader.wait(ticket)
