"""Work on tensors in parallel, results in order, under a byte budget, in buffers used again."""

import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future
from typing import Generic, TypeVar

from endor.kernels.scratch import Scratch
from endor.storage import HostBuffer
from endor.threads import thread_pool

Task = TypeVar("Task")
Result = TypeVar("Result")

MIN_BUDGET_BYTES = 96 << 20
"""Dense bytes in flight that are allowed however small the tensors are."""

_ROUND = 1 << 20


class BufferPool:
    """Buffers that are handed out again instead of being given back to the system.

    Args:
        limit_bytes: Free buffers are dropped when they and the used ones exceed this. A single
            larger request is still served.
    """

    def __init__(self, limit_bytes: int) -> None:
        self._limit = limit_bytes
        self._free: list[HostBuffer] = []
        self._total = 0
        self._lock = threading.Lock()

    def take(self, nbytes: int) -> HostBuffer:
        """Return a buffer of at least `nbytes`; its content is arbitrary."""
        with self._lock:
            fitting = [buffer for buffer in self._free if buffer.nbytes >= nbytes]
            if fitting:
                best = min(fitting, key=lambda buffer: buffer.nbytes)
                self._free.remove(best)
                return best
            size = -(-nbytes // _ROUND) * _ROUND
            while self._free and self._total + size > self._limit:
                largest = max(self._free, key=lambda buffer: buffer.nbytes)
                self._free.remove(largest)
                self._total -= largest.nbytes
            self._total += size
        return HostBuffer(size)

    def give(self, buffer: HostBuffer) -> None:
        """Take a buffer back; arrays over it must not be used any more."""
        with self._lock:
            if self._total > self._limit:
                self._total -= buffer.nbytes
            else:
                self._free.append(buffer)


class ScratchPool:
    """Memory for encoded tensors that is handed out again.

    Args:
        limit_bytes: What comes back is dropped while all of it together exceeds this.
    """

    def __init__(self, limit_bytes: int) -> None:
        self._limit = limit_bytes
        self._free: list[Scratch] = []
        self._sizes: dict[int, int] = {}
        self._lock = threading.Lock()

    def take(self) -> Scratch:
        """Return the memory used last."""
        with self._lock:
            return self._free.pop() if self._free else Scratch()

    def give(self, scratch: Scratch) -> None:
        """Take memory back; arrays in it must not be used any more."""
        with self._lock:
            self._sizes[id(scratch)] = scratch.nbytes
            if sum(self._sizes.values()) > self._limit:
                del self._sizes[id(scratch)]
            else:
                self._free.append(scratch)


class OrderedWork(Generic[Task, Result]):
    """Runs `work(task)` on threads and yields `(task, result)` in the order of the tasks.

    Tasks are admitted while the sum of their costs stays within the budget; one that exceeds it
    alone runs alone. A task's cost is held until the next pair is asked for, so whatever the
    consumer does with a result is covered. The first exception ends the iteration.

    Args:
        work: Called on a worker thread.
        cost: Bytes of a task.
        threads: Workers.
        budget_bytes: Most bytes in flight.
        prepare: Called for each task in order, on the consumer's thread, before it is admitted.
    """

    def __init__(
        self,
        work: Callable[[Task], Result],
        cost: Callable[[Task], int],
        *,
        threads: int,
        budget_bytes: int,
        prepare: Callable[[Task], None] | None = None,
    ) -> None:
        self._work = work
        self._cost = cost
        self._threads = threads
        self._budget = budget_bytes
        self._prepare = prepare

    def run(self, tasks: Iterable[Task]) -> Generator[tuple[Task, Result], None, None]:
        """Yield the results; leaving early cancels what has not begun and waits for the rest."""
        waiting = iter(tasks)
        upcoming = next(waiting, None)
        running: deque[tuple[Task, Future[Result]]] = deque()
        used = 0
        pool = thread_pool(self._threads, "endor-checkpoint")
        try:
            while upcoming is not None or running:
                while upcoming is not None and len(running) < 4 * self._threads:
                    cost = self._cost(upcoming)
                    if running and used + cost > self._budget:
                        break
                    used += cost
                    if self._prepare:
                        self._prepare(upcoming)
                    running.append((upcoming, pool.submit(self._work, upcoming)))
                    upcoming = next(waiting, None)
                task, future = running.popleft()
                yield task, future.result()
                used -= self._cost(task)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def budget_for(largest_nbytes: int) -> int:
    """Return the dense bytes in flight for a checkpoint whose largest tensor is this long."""
    return max(largest_nbytes, MIN_BUDGET_BYTES)
