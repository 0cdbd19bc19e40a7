"""Whose read goes first: parts that someone waits for, before records that are read ahead."""

import contextlib
import threading
from collections.abc import Iterator

PIECE_BYTES = 1 << 20
"""Bytes of one read where others may have to go first: what is on its way delays them."""


class Turns:
    """Lets reads ahead pause between pieces, from the first time on that a read went first."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._free = threading.Event()
        self._free.set()
        self._first = 0
        self._used = False

    @contextlib.contextmanager
    def first(self) -> Iterator[None]:
        """Have all other reads stop at their next piece while this lasts."""
        with self._lock:
            self._used = True
            self._first += 1
            self._free.clear()
        try:
            yield
        finally:
            with self._lock:
                self._first -= 1
                if not self._first:
                    self._free.set()

    def pieces(self, nbytes: int) -> Iterator[tuple[int, int]]:
        """Yield `(start, stop)` of each piece of a read, when it is its turn."""
        step = PIECE_BYTES if self._used else max(nbytes, 1)
        for start in range(0, nbytes, step):
            self._free.wait()
            yield start, min(start + step, nbytes)
