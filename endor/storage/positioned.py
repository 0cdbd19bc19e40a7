"""Reads and writes at an offset that go on after a short one, and name the file when they fail."""

import contextlib
import os
import threading
from collections import Counter, OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from endor.errors import CheckpointError

CALL_BYTES = 1 << 30
"""Most bytes of one call: Linux cuts longer ones short."""


def read_at(fd: int, out: memoryview, offset: int, path: Path) -> int:
    """Fill `out` (bytes) from `offset` on and return how many came: fewer where the file ends.

    Raises:
        OSError: The read failed; it names `path`.
    """
    done = 0
    while done < len(out):
        try:
            count = os.preadv(fd, [out[done : done + CALL_BYTES]], offset + done)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(path)) from error
        if count == 0:
            break
        done += count
    return done


def write_at(fd: int, data: bytes | memoryview, offset: int, path: Path) -> None:
    """Write all of `data` (bytes) from `offset` on.

    Raises:
        OSError: The disk is full or failed; it names `path`.
    """
    view = memoryview(data)
    while view:
        try:
            count = os.pwrite(fd, view[:CALL_BYTES], offset)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(path)) from error
        view, offset = view[count:], offset + count


class OpenFiles:
    """Files read by offset, from any thread, of which a bounded number is open at a time.

    A file that was closed in between must be the same when it is opened again.

    Args:
        limit: Files kept open; more only while more threads than that read at once.
    """

    def __init__(self, limit: int = 64) -> None:
        self._limit = limit
        self._lock = threading.Lock()
        self._open: OrderedDict[Path, int] = OrderedDict()
        self._readers: Counter[Path] = Counter()
        self._identities: dict[Path, tuple[int, ...]] = {}

    def read_into(self, path: Path, offset: int, out: np.ndarray) -> None:
        """Fill `out` (uint8) with the bytes of `path` from `offset` on.

        Raises:
            CheckpointError: the file ends early, or was replaced since the first read.
            OSError: it cannot be opened or read.
        """
        view = out.data.cast("B")
        with self._borrowed(path) as fd:
            done = read_at(fd, view, offset, path)
        if done < len(view):
            raise CheckpointError(
                f"{path}: ends at byte {offset + done}, {len(view) - done} more were expected; did "
                "it change while it was read?"
            )

    @contextmanager
    def _borrowed(self, path: Path) -> Iterator[int]:
        with self._lock:
            fd = self._open.get(path)
            if fd is None:
                fd = self._open[path] = self._opened(path)
            self._open.move_to_end(path)
            self._readers[path] += 1
            self._shrink()
        try:
            yield fd
        finally:
            with self._lock:
                self._readers[path] -= 1

    def _opened(self, path: Path) -> int:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        stat = os.fstat(fd)
        identity = (stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns)
        if self._identities.setdefault(path, identity) != identity:
            os.close(fd)
            raise CheckpointError(f"{path}: was changed while it was read; start again")
        return fd

    def _shrink(self) -> None:
        for path in list(self._open):
            if len(self._open) <= self._limit:
                return
            if not self._readers[path]:
                _give_up(self._open.pop(path))

    def close(self) -> None:
        """Close all files; nobody may be reading."""
        with self._lock:
            while self._open:
                _give_up(self._open.popitem()[1])


def _give_up(fd: int) -> None:
    """Close a file that was only read: what the system says to that changes nothing."""
    with contextlib.suppress(OSError):
        os.close(fd)
