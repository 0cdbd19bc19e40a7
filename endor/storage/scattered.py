"""Reads of some parts of a record into their own places in its buffer.

Someone waits for them, so they go before reads ahead: these stop at the next mebibyte until the
parts are here. Past the page cache all parts are asked for at once; elsewhere, and where that
fails, the threads of the reader share them.
"""

import itertools
import os
import time
from collections.abc import Sequence

import numpy as np

from endor.errors import ReadError, ShapeError
from endor.storage.at_once import read_at_once
from endor.storage.buffers import HostBuffer, destination
from endor.storage.layout import ALIGN, Record
from endor.storage.readers import RecordReader
from endor.storage.source import BlockStat, ReadStat, Source, Ticket

Spans = Sequence[tuple[int, int]]
"""Bytes `start:stop` of a record: multiples of 4096, ascending, apart."""


def read_spans(
    reader: RecordReader, record: Record, spans: Spans, buffer: HostBuffer | np.ndarray
) -> ReadStat:
    """Read `spans` of a record, each to where it lies in the record; the rest stays as it is.

    Args:
        reader: Open.
        record: From a `FileLayout`.
        spans: What to read.
        buffer: As for `RecordReader.read`: as long as the record.

    Raises:
        ShapeError: A span is no whole blocks of the record, or the buffer does not fit.
        ReadError, TruncatedError, IntegrityError, BackendError: As `submit` and `wait`.
    """
    data = destination(buffer, record.nbytes, record)
    at = 0
    for start, stop in spans:
        if not at <= start < stop <= record.nbytes or start % ALIGN or stop % ALIGN:
            raise ShapeError(
                f"{record.path}: record {record.name!r}: spans must be ascending blocks of {ALIGN} "
                f"in 0..{record.nbytes}, got {start}:{stop}"
            )
        at = stop
    began = time.perf_counter()
    ticket = Ticket(record, data, 0, 0)
    with reader._lock:
        if reader._closed:
            raise ReadError(f"{record.path}: the reader is closed; open a new one")
        source = reader._source(record)
        reader._users[record.path] += 1
        reader._enter()
        ticket._blocks = 2
    stat, left = BlockStat(), spans
    cpu = time.thread_time()
    try:
        with reader.turns.first():
            left = _read_at_once(reader, source, record, spans, data, stat)
    except BaseException as error:
        ticket._fail(error)
        left = []
    reader._end_block(ticket, stat, time.thread_time() - cpu)
    _share(reader, ticket, source, left, data)
    reader._end_block(ticket, BlockStat(), 0.0)
    waited = reader.wait(ticket)
    nbytes = sum(stop - start for start, stop in spans)
    return ReadStat(nbytes, time.perf_counter() - began, waited.retries)


def _read_at_once(
    reader: RecordReader,
    source: Source,
    record: Record,
    spans: Spans,
    data: np.ndarray,
    stat: BlockStat,
) -> Spans:
    """Read all spans at once, where the system can; return those that did not come whole."""
    handle = source.handle
    if not handle.direct or reader._preadv is not os.preadv or not spans:
        return spans
    begins, ends = np.array(spans, dtype=np.uint64).T
    offsets, lengths = begins + np.uint64(record.offset), ends - begins
    addresses = begins + np.uint64(data.ctypes.data)
    results = read_at_once(handle.fd, offsets, lengths, addresses)
    if results is None:
        return spans
    whole = results == lengths.astype(np.int64)
    stat.reads += len(spans)
    stat.direct_bytes += int(lengths[whole].sum())
    left = [spans[at] for at in np.flatnonzero(~whole).tolist()]
    stat.retries += len(left)
    return left


def _share(
    reader: RecordReader, ticket: Ticket, source: Source, spans: Spans, data: np.ndarray
) -> None:
    """Have the reader's threads read the spans, each a run of them; this one takes part."""
    groups = _groups(spans, reader._threads)
    with reader._lock:
        ticket._forget(-len(groups))
        submitted = 0
        try:
            for group in groups[1:]:
                future = reader._pool.submit(_read_group, reader, ticket, source, group, data)
                submitted += 1
                future.add_done_callback(reader._when_cancelled(ticket))
        except BaseException as error:
            ticket._fail(error)
            ticket._forget(len(groups) - 1 - submitted)
    for group in groups[:1]:
        _read_group(reader, ticket, source, group, data)


def _groups(spans: Spans, count: int) -> list[Spans]:
    """Return `spans` in at most `count` runs of like many bytes."""
    ends = np.cumsum([stop - start for start, stop in spans])
    if not len(ends):
        return []
    cuts = np.searchsorted(ends, ends[-1] * np.arange(1, count) / count, side="left") + 1
    bounds = sorted({0, *(int(cut) for cut in cuts), len(spans)})
    return [spans[a:b] for a, b in itertools.pairwise(bounds) if a < b]


def _read_group(
    reader: RecordReader, ticket: Ticket, source: Source, spans: Spans, data: np.ndarray
) -> None:
    cpu, stat, record = time.thread_time(), BlockStat(), ticket.record
    try:
        for start, stop in spans:
            source.fill(
                data[start:stop].data,
                record.offset + start,
                what=f"record {record.name!r}",
                stat=stat,
                stopped=lambda: reader._closed or ticket._stopped(),
            )
        if reader._closed:
            reader._fail_closed(ticket)
    except BaseException as error:
        ticket._fail(error)
    reader._end_block(ticket, stat, time.thread_time() - cpu)
