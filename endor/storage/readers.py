"""Readers: whole records, or parts of them, from disk into aligned buffers, several at a time."""

import os
import threading
import time
import weakref
from collections import Counter, OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from types import TracebackType
from typing import Any, Self, get_args

import numpy as np

from endor.errors import BackendError, ConfigError, ReadError, ShapeError, TruncatedError
from endor.kernels.dispatch import check_threads
from endor.storage.buffers import HostBuffer, destination
from endor.storage.layout import ALIGN, Record, align_up
from endor.storage.source import BlockStat, Preadv, ReaderKind, ReadStat, Source, Ticket
from endor.storage.turns import Turns
from endor.threads import thread_pool

_MAX_BLOCK_BYTES = 1 << 30

MAX_OPEN_FILES = 64
"""Files that a reader keeps open; more only while as many are being read."""


class RecordReader:
    """Reads records with a few threads; made by `open_reader`, a context manager.

    Every method may be called from any thread. A file is opened once and its descriptor shared; of
    many files those read last stay open.

    Attributes:
        turns: Whose read goes first.
    """

    def __init__(self, kind: ReaderKind, threads: int, block_bytes: int, preadv: Preadv) -> None:
        self._kind = kind
        self._threads = threads
        self._block_bytes = block_bytes
        self._preadv = preadv
        self._lock = threading.RLock()
        self._closed = False
        self._sources: OrderedDict[Path, Source] = OrderedDict()
        self._users: Counter[Path] = Counter()
        self._reasons: set[str] = set()
        self._pool = thread_pool(threads, "endor-read")
        self._total = BlockStat()
        self._records = 0
        self._cpu_s = 0.0
        self._busy_s = 0.0
        self._active = 0
        self._active_since = 0.0
        self.turns = Turns()
        weakref.finalize(self, _close_sources, self._sources)

    def submit(
        self,
        record: Record,
        buffer: HostBuffer | np.ndarray,
        *,
        start: int = 0,
        stop: int | None = None,
    ) -> Ticket:
        """Start reading a record, or bytes `start:stop` of it, and return at once.

        Blocks are read in the order of submission. What is read is `start:stop` rounded outwards
        to multiples of 4096, from the first byte of the buffer on.

        Args:
            record: From a `FileLayout`.
            buffer: A `HostBuffer`, or a flat u8 array whose address is a multiple of 4096, at
                least as long as what is read. It is the reader's until the ticket is done.
            start: First byte wanted, counted from the record's start.
            stop: First byte not wanted; the record's end when omitted.

        Raises:
            ShapeError: The buffer or the range does not fit.
            TruncatedError: The file is too short.
            IntegrityError: It was replaced by another since it was first read from.
            BackendError: A forced `"direct"` cannot run on the file.
            ReadError: The reader is closed.
            OSError: The file cannot be opened.
        """
        return self._submit(record, buffer, start, record.nbytes if stop is None else stop)

    def _submit(
        self,
        record: Record,
        buffer: HostBuffer | np.ndarray,
        start: int,
        stop: int,
        *,
        takes_part: bool = False,
    ) -> Ticket:
        """Start reading; a caller that waits anyway `takes_part` by reading one block itself."""
        if not 0 <= start <= stop <= record.nbytes:
            raise ShapeError(
                f"{record.path}: record {record.name!r}: range must lie in 0..{record.nbytes}, got "
                f"{start}:{stop}"
            )
        first = start // ALIGN * ALIGN
        data = destination(buffer, align_up(stop, ALIGN) - first, record)
        ticket = Ticket(record, data, start - first, stop - start)
        with self._lock:
            if self._closed:
                raise ReadError(f"{record.path}: the reader is closed; open a new one")
            source = self._source(record)
            self._users[record.path] += 1
            self._enter()
            spans = _spans(data.size, self._block_bytes)
            ticket._blocks = len(spans) + 1
            own = spans[:1] if takes_part else []
            submitted = len(own)
            try:
                for begin, end in spans[len(own) :]:
                    out, at = data[begin:end].data, record.offset + first + begin
                    future = self._pool.submit(self._read_block, ticket, source, out, at)
                    submitted += 1
                    future.add_done_callback(self._when_cancelled(ticket))
            except BaseException as error:  # no thread to be had, Ctrl-C: the rest never starts
                ticket._fail(_without_thread(error, record))
                ticket._forget(len(spans) - submitted)
        for begin, end in own:
            self._read_block(ticket, source, data[begin:end].data, record.offset + first + begin)
        self._end_block(ticket, BlockStat(), 0.0)
        if isinstance(ticket._error, KeyboardInterrupt):
            self.wait(ticket)
        return ticket

    def wait(self, ticket: Ticket) -> ReadStat:
        """Return when the read is over and all its bytes are in the buffer.

        When it raises, no thread touches the buffer any more and its content is undefined.

        Raises:
            TruncatedError: The file ended early.
            ReadError: The device failed, or the reader was closed meanwhile.
            BackendError: A forced `"direct"` was refused.
        """
        return ticket._result()

    def read(self, record: Record, buffer: HostBuffer | np.ndarray) -> ReadStat:
        """Read a whole record, a block of it on this thread; errors as for `submit`, `wait`."""
        return self.wait(self._submit(record, buffer, 0, record.nbytes, takes_part=True))

    def read_range(
        self, record: Record, start: int, stop: int, buffer: HostBuffer | np.ndarray
    ) -> np.ndarray:
        """Read bytes `start:stop` of a record and return them as a view of the buffer.

        The buffer needs up to 8190 bytes more than the range: it is rounded outwards to whole
        pages. Errors as for `submit` and `wait`.
        """
        return self.submit(record, buffer, start=start, stop=stop).array

    def close(self) -> None:
        """End all threads and close all files; unfinished tickets fail. May be called twice."""
        with self._lock:
            self._closed = True
        self._pool.shutdown(wait=True, cancel_futures=True)
        _close_sources(self._sources)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def describe(self) -> dict[str, Any]:
        """Return what was asked for, what really happened, why, and what it cost so far."""
        with self._lock:
            total = self._total
            paths = {
                "direct": total.direct_bytes,
                "buffered": total.buffered_bytes,
            }
            observed = [name for name, nbytes in paths.items() if nbytes]
            nbytes = sum(paths.values())
            busy = self._busy_s
            if self._active:
                busy += time.perf_counter() - self._active_since
            return {
                "requested": self._kind,
                "observed": "mixed" if len(observed) > 1 else (observed or ["none"])[0],
                "reason": self._reason,
                "threads": self._threads,
                "block_bytes": self._block_bytes,
                "records": self._records,
                "bytes": nbytes,
                "seconds": busy,
                "gbps": nbytes / busy / 1e9 if busy else 0.0,
                "reads": total.reads,
                "retries": total.retries,
                "cpu_s": self._cpu_s,
            }

    @property
    def _reason(self) -> str:
        reasons = sorted(self._reasons | {source.reason for source in self._sources.values()})
        return "; ".join(reasons) or "nothing was read yet"

    def _source(self, record: Record) -> Source:
        source = self._sources.get(record.path)
        if source is None:
            self._close_idle()
            source = self._sources[record.path] = Source(record.path, self._kind, self._preadv)
        self._sources.move_to_end(record.path)
        size, needed = source.nbytes, record.offset + record.nbytes
        if size < needed:
            raise TruncatedError(
                f"{record.path}: record {record.name!r}: truncated: has {size} bytes, needs "
                f"{needed}; copy or convert the file again"
            )
        source.check_place(f"record {record.name!r}")
        return source

    def _close_idle(self) -> None:
        """Make room for one more file: close those that were not read for longest."""
        for path in list(self._sources):
            if len(self._sources) < MAX_OPEN_FILES:
                return
            if not self._users[path]:
                source = self._sources.pop(path)
                self._reasons.add(source.reason)
                source.close()

    def _read_block(self, ticket: Ticket, source: Source, out: memoryview, offset: int) -> None:
        cpu = time.thread_time()
        stat = BlockStat()
        try:
            for start, stop in self.turns.pieces(len(out)):
                source.fill(
                    out[start:stop],
                    offset + start,
                    what=f"record {ticket.record.name!r}",
                    stat=stat,
                    stopped=lambda: self._closed or ticket._stopped(),
                )
            if self._closed:
                self._fail_closed(ticket)
        except BaseException as error:
            ticket._fail(error)
        self._end_block(ticket, stat, time.thread_time() - cpu)

    def _fail_closed(self, ticket: Ticket) -> None:
        ticket._fail(ReadError(f"{ticket.record.path}: the reader was closed during a read"))

    def _when_cancelled(self, ticket: Ticket) -> Callable[[Future[None]], None]:
        def callback(future: Future[None]) -> None:
            if future.cancelled():
                self._fail_closed(ticket)
                self._end_block(ticket, BlockStat(), 0.0)

        return callback

    def _enter(self) -> None:
        if not self._active:
            self._active_since = time.perf_counter()
        self._active += 1

    def _end_block(self, ticket: Ticket, stat: BlockStat, cpu_s: float) -> None:
        with self._lock:  # what a finished ticket read is in the totals already
            self._total.direct_bytes += stat.direct_bytes
            self._total.buffered_bytes += stat.buffered_bytes
            self._total.reads += stat.reads
            self._total.retries += stat.retries
            self._cpu_s += cpu_s
            last = ticket._end_block(stat.retries)
            if last:
                self._records += 1
                self._users[ticket.record.path] -= 1
                self._active -= 1
                if not self._active:
                    self._busy_s += time.perf_counter() - self._active_since
        if last:
            ticket._finish()


def open_reader(
    kind: ReaderKind = "auto",
    *,
    threads: int = 4,
    block_bytes: int = 4 << 20,
    preadv: Preadv = os.preadv,
) -> RecordReader:
    """Return a reader of records.

    `"direct"` bypasses the page cache (O_DIRECT): the fastest and by far the cheapest in CPU time
    for what does not fit into memory, and no help for what is read again and again. `"buffered"`
    goes through the page cache. `"auto"` is direct wherever the file system lets it;
    `RecordReader.describe` tells what happened and why.

    Args:
        kind: A forced kind never falls back.
        threads: Reads in flight.
        block_bytes: Most bytes of one read, a multiple of 4096.
        preadv: The system call, replaceable for tests.

    Raises:
        ConfigError: An argument is out of range.
        BackendError: `"direct"` was asked for on a platform without O_DIRECT.
    """
    if kind not in get_args(ReaderKind):
        raise ConfigError(f"reader must be one of {get_args(ReaderKind)}, got {kind!r}")
    check_threads(threads, "reader threads")
    if block_bytes % ALIGN or not ALIGN <= block_bytes <= _MAX_BLOCK_BYTES:
        raise ConfigError(
            f"block_bytes must be a multiple of {ALIGN} up to {_MAX_BLOCK_BYTES}, got {block_bytes}"
        )
    if kind == "direct" and not hasattr(os, "O_DIRECT"):
        raise BackendError("reader 'direct' needs O_DIRECT, which this platform lacks; use 'auto'")
    return RecordReader(kind, threads, block_bytes, preadv)


def _without_thread(error: BaseException, record: Record) -> BaseException:
    """Return what to raise for an error of starting a read."""
    if not isinstance(error, RuntimeError):
        return error
    return ReadError(
        f"{record.path}: record {record.name!r}: no thread to read it with ({error}): raise the "
        "limit of processes (ulimit -u) or of memory, or ask for fewer threads"
    )


def _spans(nbytes: int, block_bytes: int) -> list[tuple[int, int]]:
    """Return the blocks of a read: as equal as whole pages allow, none above `block_bytes`."""
    count = -(-nbytes // block_bytes)
    if not count:
        return []
    step = align_up(-(-nbytes // count), ALIGN)
    return [(at, min(at + step, nbytes)) for at in range(0, nbytes, step)]


def _close_sources(sources: dict[Path, Source]) -> None:
    for source in sources.values():
        source.close()
