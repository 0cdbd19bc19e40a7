"""Appending to a file at the disk's speed without filling the page cache."""

import os
from pathlib import Path

from endor.storage.positioned import write_at

PIECE_BYTES = 4 << 20
"""Bytes of one write call."""

LAG_BYTES = 32 << 20
"""How far behind the last write the pages are dropped: by then the disk has them."""


class Sink:
    """Appends bytes from a given offset of a file on.

    Linux writes dirty pages out late and then all at once, so that a plain writer stalls in fsync
    and pushes everything else out of the page cache. POSIX_FADV_DONTNEED on a range starts its
    write-out at once, and on a range that is clean drops its pages: it is called twice.

    Args:
        fd: Descriptor open for writing.
        path: Name for error messages.
        position: Where the first byte goes.
    """

    def __init__(self, fd: int, path: Path, position: int) -> None:
        self.position = position
        self._fd = fd
        self._path = path
        self._pending = memoryview(bytearray(PIECE_BYTES))
        self._fill = 0
        self._started = position
        self._dropped = position

    def append(self, data: memoryview) -> None:
        """Append `data`, which may change once this returns."""
        self.position += len(data)
        while data:
            if not self._fill and len(data) >= PIECE_BYTES:
                self._write(data[:PIECE_BYTES], self.position - len(data))
                data = data[PIECE_BYTES:]
                continue
            take = min(len(data), PIECE_BYTES - self._fill)
            self._pending[self._fill : self._fill + take] = data[:take]
            self._fill += take
            data = data[take:]
            if self._fill == PIECE_BYTES:
                self._drain(self.position - len(data))

    def flush(self) -> None:
        """Hand everything to the kernel."""
        self._drain(self.position)

    def write_at(self, data: memoryview, offset: int) -> None:
        """Write `data` at `offset`, outside the stream.

        Raises:
            OSError: The disk is full or failed; it names the file.
        """
        write_at(self._fd, data, offset, self._path)

    def _drain(self, end: int) -> None:
        fill, self._fill = self._fill, 0
        self._write(self._pending[:fill], end - fill)

    def _write(self, data: memoryview, offset: int) -> None:
        self.write_at(data, offset)
        end = offset + len(data)
        self._advise(self._started, end)
        self._started = end
        if end - self._dropped >= 2 * LAG_BYTES:
            self._advise(self._dropped, end - LAG_BYTES)
            self._dropped = end - LAG_BYTES

    def _advise(self, start: int, stop: int) -> None:
        if stop > start and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._fd, start, stop - start, os.POSIX_FADV_DONTNEED)
