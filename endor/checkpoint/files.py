"""Stock safetensors files: strict header parsing, and reads by offset into the caller's buffer."""

import os
import threading
from collections import Counter, OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from endor.codecs import DType, dtype
from endor.errors import CheckpointError, FormatError
from endor.foreign import describe_file
from endor.storage.header import Header, check_plain

READ_BYTES = 1 << 30


@dataclass(frozen=True, slots=True)
class Extent:
    """Where a tensor lies in its file."""

    dtype: DType
    shape: tuple[int, ...]
    offset: int
    nbytes: int


def read_header(path: Path) -> tuple[dict[str, Extent], Mapping[str, str]]:
    """Return tensors and metadata of a safetensors file after checking them against its size.

    Raises:
        CheckpointError: the file is missing, unreadable, truncated or contradicts itself.
    """
    try:
        header = Header.read(path)
        check_plain(header)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file; is the checkpoint complete?") from None
    except FormatError as error:
        described = describe_file(path)
        raise CheckpointError(f"{path}: {described}" if described else str(error)) from None
    tensors = {
        name: Extent(
            dtype(entry.dtype),
            entry.shape,
            header.data_start + entry.start,
            entry.stop - entry.start,
        )
        for name, entry in header.entries.items()
    }
    return tensors, header.metadata


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
            done = 0
            while done < len(view):
                try:
                    count = os.preadv(fd, [view[done : done + READ_BYTES]], offset + done)
                except OSError as error:
                    raise OSError(error.errno, error.strerror, str(path)) from error
                if count == 0:
                    raise CheckpointError(
                        f"{path}: ends at byte {offset + done}, {len(view) - done} more were "
                        "expected; did it change while it was read?"
                    )
                done += count

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
                os.close(self._open.pop(path))

    def close(self) -> None:
        """Close all files; nobody may be reading."""
        with self._lock:
            while self._open:
                os.close(self._open.popitem()[1])
