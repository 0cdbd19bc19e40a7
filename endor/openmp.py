"""Torch's OpenMP threads, kept from spinning on the processors that Endor's kernels need next.

After a parallel region GNU's libgomp lets its threads spin, 300,000 rounds of it, in case the next
region comes at once. Where products by torch and by Endor take turns, each of Endor's then shares
the processors with threads that do nothing. `OMP_WAIT_POLICY=PASSIVE` ends that, but has to be set
before torch is imported. With more threads than processors libgomp spins a hundred rounds only, as
its manual says of `GOMP_SPINCOUNT`; so a team of threads that sleep is made, one more than there
are processors, and let be.
"""

import ctypes
import os
import threading
from pathlib import Path

import torch

_SETTINGS = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
_lock = threading.Lock()
_settled: set[int] = set()
"""Processes in which that was done, or need not be."""


def settle() -> bool:
    """See that torch's threads sleep soon after their work; return whether this call saw to it.

    Once a process; nothing where the environment says how threads wait, where torch runs on another
    OpenMP than libgomp, or with one thread, which waits for none.
    """
    with _lock:
        if os.getpid() in _settled:
            return False
        _settled.add(os.getpid())
    path = _libgomp()
    if path is None or torch.get_num_threads() < 2 or any(map(os.environ.get, _SETTINGS)):
        return False
    # One that is not counted, and those of torch's team but for the first, are there already.
    idle = len(os.sched_getaffinity(0)) + 2 - torch.get_num_threads()
    begun = threading.Event()
    thread = threading.Thread(
        target=_keep_team, args=(path, max(2, idle), begun), name="openmp-idle", daemon=True
    )
    try:
        thread.start()
    except RuntimeError:  # no more threads: slower, and no reason to end
        return False
    return begun.wait(10.0)


def _keep_team(path: str, threads: int, begun: threading.Event) -> None:
    library = ctypes.CDLL(path)
    free = ctypes.CDLL(None).free
    # Each of the team calls free(NULL), which does nothing.
    library.GOMP_parallel.argtypes = [
        ctypes.c_void_p,
        ctypes.c_void_p,
        ctypes.c_uint,
        ctypes.c_uint,
    ]
    library.GOMP_parallel.restype = None
    library.GOMP_parallel(ctypes.cast(free, ctypes.c_void_p), None, threads, 0)
    begun.set()
    threading.Event().wait()  # the team ends with this thread


def _libgomp() -> str | None:
    """Return the path of the libgomp that this process has loaded; None without one."""
    try:
        lines = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    names = {line.split(maxsplit=5)[-1] for line in lines if "/libgomp" in line}
    return min(names) if len(names) == 1 else None
