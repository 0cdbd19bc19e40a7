"""Pools of threads that say when there is no memory for one, instead of waiting for ever."""

import _thread
import threading
from concurrent.futures import ThreadPoolExecutor

START_S = 10.0
"""A thread that has not begun by then never will."""


def thread_pool(threads: int, name: str) -> ThreadPoolExecutor:
    """Return a pool of at most `threads` threads called `name`.

    `Thread.start` waits for a sign of life, without end: a thread that gets no memory dies before
    it gives one. So one is started and ended first, from a thread that nobody waits for.

    Raises:
        MemoryError: There is no memory for a thread.
    """
    begun = _thread.allocate_lock()
    begun.acquire()

    trial = threading.Thread(target=begun.release)
    try:
        _thread.start_new_thread(trial.start, ())
    except RuntimeError as error:  # the system says no
        raise MemoryError(f"no memory for a thread: {error}") from None
    if not begun.acquire(timeout=START_S):
        raise MemoryError("no memory for a thread")
    return ThreadPoolExecutor(threads, thread_name_prefix=name)
