"""Starting threads, all of them or none."""

import threading
from collections.abc import Callable, Sequence

from endor.errors import BackendError


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
