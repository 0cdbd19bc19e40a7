"""Endor's threads on the processors that vLLM gave to this process.

vLLM's CPU worker binds every OpenMP thread to a processor of its own, the main thread too. What the
main thread starts then would be bound to that one processor, and Endor's kernels start their
helpers when they are first used.
"""

import os
import threading
from pathlib import Path

import numpy as np
import torch

from endor import codecs, kernels

_WORK = 4 << 20
"""Elements of a first piece of work: enough for the kernels to start all their helpers."""


def start_helpers() -> int | None:
    """Start the kernels' helpers where OpenMP's threads are; return how many threads to use.

    None, which is Endor's own choice, where nothing is bound, or `ENDOR_THREADS` is set.
    """
    if not hasattr(os, "sched_getaffinity") or os.environ.get("ENDOR_THREADS"):
        return None
    if len(os.sched_getaffinity(0)) > 1:
        return None
    torch.ones(_WORK).sum()  # OpenMP starts its threads when there is work for them
    processors = bound_processors()
    count = min(len(processors), torch.get_num_threads())
    if count < 2:
        return None
    helper = threading.Thread(target=_work_on, args=(processors, count), name="endor-helpers")
    helper.start()
    helper.join()
    return count


def bound_processors() -> set[int]:
    """Return the processors to which threads of this process are bound one by one."""
    found: set[int] = set()
    for task in Path("/proc/self/task").iterdir():
        try:
            own = os.sched_getaffinity(int(task.name))
        except OSError:  # it has ended
            continue
        if len(own) == 1:
            found |= own
    return found


def _work_on(processors: set[int], count: int) -> None:
    os.sched_setaffinity(0, processors)  # of this thread, and of those that it starts
    encoded = kernels.encode(
        np.zeros(_WORK, dtype=np.uint16), codecs.dtype("BF16"), codec="raw", threads=count
    )
    kernels.decode(encoded, np.empty(_WORK, dtype=np.uint16), threads=count)
