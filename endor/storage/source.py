"""Files that a reader has open, the loop that fills memory from one, and reads under way."""

import contextlib
import errno
import fcntl
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from endor.errors import BackendError, IntegrityError, ReadError, TruncatedError
from endor.storage.layout import ALIGN, Record

ReaderKind = Literal["auto", "direct", "buffered"]
Preadv = Callable[[int, list[memoryview], int], int]
"""`os.preadv`, or what a test puts in its place: descriptor, buffers, offset -> bytes read."""

_O_DIRECT: int = getattr(os, "O_DIRECT", 0)
_MAX_STALLS = 16
_REFUSALS = (errno.EINVAL, errno.ENOTSUP)


@dataclass(frozen=True, slots=True)
class Handle:
    """A descriptor, and whether the kernel says that it bypasses the page cache."""

    fd: int
    direct: bool


@dataclass(slots=True)
class BlockStat:
    """What one block took: bytes read directly and buffered, read calls, retried ones."""

    direct_bytes: int = 0
    buffered_bytes: int = 0
    reads: int = 0
    retries: int = 0


class Source:
    """A file opened once for all threads of a reader, with O_DIRECT where possible.

    Args:
        path: The file.
        kind: `"auto"` goes over to buffered reads when the file system refuses direct ones, at
            the opening or at the first read; `"direct"` raises instead.
        preadv: The read call.

    Raises:
        BackendError: `kind` is `"direct"` and the file system refuses it.
        OSError: The file cannot be opened.
    """

    def __init__(self, path: Path, kind: ReaderKind, preadv: Preadv) -> None:
        self.path = path
        self.reason = "buffered reads were asked for"
        self._kind = kind
        self._preadv = preadv
        self._lock = threading.Lock()
        self._proved = False
        self._fds: list[int] = []
        self.handle = self._open(direct=kind != "buffered")

    def _open(self, *, direct: bool) -> Handle:
        if direct:
            try:
                if not _O_DIRECT:
                    raise OSError(errno.ENOTSUP, "this platform has no O_DIRECT")
                handle = self._open_with(_O_DIRECT)
            except OSError as error:
                if error.errno not in _REFUSALS:
                    raise
                self._refused("open", error)
            else:
                self.reason = "O_DIRECT works on this file system"
                return handle
        return self._open_with(0)

    def _open_with(self, extra: int) -> Handle:
        fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC | extra)
        self._fds.append(fd)
        return Handle(fd, bool(fcntl.fcntl(fd, fcntl.F_GETFL) & _O_DIRECT))

    def _refused(self, what: str, error: OSError) -> None:
        if self._kind == "direct":
            raise BackendError(
                f"{self.path}: reader 'direct' cannot run: O_DIRECT {what} gives "
                f"{error.strerror!r}; use 'auto' or 'buffered', or another file system"
            ) from error
        self.reason = f"O_DIRECT {what} gives {error.strerror!r} on {self.path}"

    def _fall_back(self, error: OSError) -> bool:
        """Go over to buffered reads; False where a direct read has already worked."""
        with self._lock:
            if self.handle.direct:
                if self._proved:
                    return False
                self._refused("read", error)
                self.handle = self._open_with(0)
            return True

    def check_place(self, what: str) -> None:
        """Raise unless the path still leads to the file that was opened, or nowhere.

        A file that was deleted or moved away is read to the end. Whether this one was written to
        only its bytes can tell: times and sizes are set by links, backups and copies, too.

        Args:
            what: The record that is to be read, for the message.

        Raises:
            IntegrityError: It was replaced by another.
        """
        with contextlib.suppress(OSError):
            if not os.path.samestat(self.path.stat(), os.fstat(self.handle.fd)):
                raise IntegrityError(
                    f"{self.path}: {what}: the file was replaced by another while it was in use; "
                    "load it again"
                )

    @property
    def nbytes(self) -> int:
        """Present size of the file."""
        return os.fstat(self.handle.fd).st_size

    def fill(
        self,
        out: memoryview,
        offset: int,
        *,
        what: str,
        stat: BlockStat,
        stopped: Callable[[], bool],
    ) -> None:
        """Read `len(out)` bytes at `offset`, or fewer once `stopped` says so.

        Args:
            out: Destination; address, length and `offset` are multiples of `ALIGN`.
            offset: First byte in the file.
            what: The record, for error messages.
            stat: Counts what happens.
            stopped: Asked before each read.

        Raises:
            TruncatedError: The file ends before the block.
            ReadError: The device failed.
            BackendError: A forced direct read is refused.
        """
        done = furthest = stalls = 0
        while done < len(out) and not stopped():
            handle = self.handle
            stat.reads += 1
            try:
                count = self._preadv(handle.fd, [out[done:]], offset + done)
            except InterruptedError:
                stat.retries += 1
                continue
            except OSError as error:
                if handle.direct and error.errno in _REFUSALS and self._fall_back(error):
                    stat.retries += 1
                    continue
                raise ReadError(
                    f"{self.path}: {what}: reading {len(out) - done} bytes at offset "
                    f"{offset + done} failed: {error.strerror}; check the disk"
                ) from error
            done += count
            if done < len(out):
                self._check_end(count, offset, len(out), what)
                stat.retries += 1
                if handle.direct:
                    done -= done % ALIGN
            stalls = 0 if done > furthest else stalls + 1
            if stalls > _MAX_STALLS:
                raise ReadError(
                    f"{self.path}: {what}: no progress at offset {offset + done} in {stalls} "
                    "reads; check the disk"
                )
            gained = max(done - furthest, 0)
            furthest = max(done, furthest)
            if handle.direct:
                self._proved = True
                stat.direct_bytes += gained
            else:
                stat.buffered_bytes += gained

    def _check_end(self, count: int, offset: int, nbytes: int, what: str) -> None:
        size = self.nbytes
        if count == 0 or size < offset + nbytes:
            raise TruncatedError(
                f"{self.path}: {what}: truncated: has {size} bytes, needs {offset + nbytes}; the "
                "file was changed while it was read: copy or convert it again"
            )

    def close(self) -> None:
        """Close all descriptors; call it when no thread reads any more."""
        while self._fds:
            with contextlib.suppress(OSError):
                os.close(self._fds.pop())


@dataclass(frozen=True, slots=True)
class ReadStat:
    """One finished read.

    Attributes:
        nbytes: Bytes read, alignment included.
        seconds: From submission to the last byte.
        retries: Short, interrupted or refused read calls that were repeated.
    """

    nbytes: int
    seconds: float
    retries: int


class Ticket:
    """A read that was submitted; `RecordReader.wait` says how it ended."""

    def __init__(self, record: Record, data: np.ndarray, skip: int, length: int) -> None:
        self.record = record
        self._data = data
        self._wanted = data[skip : skip + length]
        self._began = time.perf_counter()
        self._lock = threading.Lock()
        self._finished = threading.Event()
        self._blocks = 0
        self._retries = 0
        self._error: BaseException | None = None
        self._stat: ReadStat | None = None

    @property
    def done(self) -> bool:
        """Whether no thread touches the buffer any more, for good or ill."""
        return self._finished.is_set()

    @property
    def array(self) -> np.ndarray:
        """The bytes that were asked for, as a view of the buffer; waits for them.

        Raises:
            ReadError, TruncatedError, BackendError: As `RecordReader.wait`.
        """
        self._result()
        return self._wanted

    def settle(self) -> None:
        """Wait until no thread touches the buffer any more, however the read ended."""
        self._finished.wait()

    def _stopped(self) -> bool:
        return self._error is not None

    def _fail(self, error: BaseException) -> None:
        with self._lock:
            if self._error is None:
                self._error = error

    def _forget(self, blocks: int) -> None:
        """Leave out blocks that will never start."""
        with self._lock:
            self._blocks -= blocks

    def _end_block(self, retries: int) -> bool:
        """Count one block as over; True for the last one."""
        with self._lock:
            self._blocks -= 1
            self._retries += retries
            return self._blocks == 0

    def _finish(self) -> None:
        seconds = time.perf_counter() - self._began
        self._stat = ReadStat(self._data.size, seconds, self._retries)
        self._finished.set()

    def _result(self) -> ReadStat:
        self.settle()
        if self._error is not None:
            raise self._error
        assert self._stat is not None
        return self._stat
