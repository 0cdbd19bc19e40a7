"""Threads that say when there is no memory for them, instead of waiting for ever."""

import _thread
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from endor.errors import BackendError

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


def start_all(threads: Sequence[threading.Thread], give_up: Callable[[], None]) -> None:
    """Start `threads`; when the system has no more, end those that run, and raise.

    Args:
        threads: Not started yet.
        give_up: Tells the running ones to end, and waits for them.

    Raises:
        BackendError: The system has no more threads.
    """
    for count, thread in enumerate(threads):
        try:
            thread.start()
        except RuntimeError as error:
            give_up()
            raise BackendError(
                f"{thread.name}: the system starts no more than {count} of {len(threads)} threads "
                f"({error}): raise the limit of processes (ulimit -u) or of memory, or ask for "
                "fewer threads"
            ) from error


def join_all(threads: Sequence[threading.Thread]) -> None:
    """Wait for the end of those that were started, but for the calling thread itself."""
    for thread in threads:
        if thread.ident is not None and thread is not threading.current_thread():
            thread.join()
