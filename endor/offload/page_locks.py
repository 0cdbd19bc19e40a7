"""Which host memory is page-locked for a device, and how a copy is cut along it.

CUDA takes a copy whose host memory is locked as a whole, by one registration, or not at all; one
that crosses from a registration into the next, or into pageable memory, it may refuse. Locked
memory is registered in pieces, and a copy may begin anywhere in it, so copies are cut where pieces
meet.
"""

import bisect
import threading
from collections.abc import Callable, Iterator

import numpy as np

PAGE_BYTES = 4096


class PageLocks:
    """Registrations of host memory; safe for threads.

    Args:
        register: Locks `nbytes` at an address; returns None, or why the system refused.
        unregister: Undoes it, given the address.
    """

    def __init__(
        self, register: Callable[[int, int], str | None], unregister: Callable[[int], None]
    ) -> None:
        self._register = register
        self._unregister = unregister
        self._starts: list[int] = []
        self._stops: list[int] = []
        self._lock = threading.Lock()

    def lock(self, memory: np.ndarray) -> str | None:
        """Lock memory that owns its pages, such as a `HostBuffer` or a part of one.

        Returns:
            None, or why not. Memory in the middle of a page is refused: its neighbours would be
            locked with it, and unlocked when it is.
        """
        start = int(memory.ctypes.data)
        if start % PAGE_BYTES:
            return f"memory at {start:#x} does not begin at a page and would share one"
        reason = self._register(start, memory.nbytes)
        if reason is None:
            with self._lock:
                at = bisect.bisect(self._starts, start)
                self._starts.insert(at, start)
                self._stops.insert(at, start + memory.nbytes)
        return reason

    def unlock(self, memory: np.ndarray) -> None:
        """Undo `lock`; nothing may be copying from it."""
        start = int(memory.ctypes.data)
        with self._lock:
            at = bisect.bisect_left(self._starts, start)
            assert at < len(self._starts), "memory that was never locked"
            assert self._starts[at] == start, "memory that was never locked"
            del self._starts[at], self._stops[at]
        self._unregister(start)

    def pieces(self, memory: np.ndarray) -> Iterator[tuple[int, int]]:
        """Yield `(begin, end)` in bytes of the parts of `memory` that one copy may take."""
        start = int(memory.ctypes.data)
        stop = start + memory.nbytes
        with self._lock:
            first = bisect.bisect(self._stops, start)
            last = bisect.bisect_left(self._starts, stop)
            inside = [*self._starts[first:last], *self._stops[first:last]]
        cuts = sorted({at for at in inside if start < at < stop})
        yield from zip(
            [at - start for at in (start, *cuts)],
            [at - start for at in (*cuts, stop)],
            strict=True,
        )
