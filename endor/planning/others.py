"""How much of processor and disk other processes took while something was measured.

Linux counts each processor's busy time (`/proc/stat`, in hundredths of a second) and this process's
own; what a hypervisor took away (steal) counts as others'. Where that cannot be read nothing is
known to have disturbed. It counts what each disk moves as well (`/sys/dev/block`), in sectors.
"""

import os
import time
from pathlib import Path

DISTURBED = 0.1
"""Share of what a measurement wanted, and others had: above it, its rates are not
those of a quiet machine. A hundredth is what a desktop does by itself."""

_STAT = Path("/proc/stat")
_TICKS = os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 100
_IDLE = (3, 4)
"""Columns of a processor's line: idle, and waiting for a disk."""
_SECTORS_READ, _SECTORS_WRITTEN, _SECTOR = 2, 6, 512
"""Columns of a disk's line, and bytes of what they count."""
_COLUMNS = 8
"""Up to steal; guests' time is counted in the first ones."""


class Others:
    """Watches the processors that this process may use, from its making on.

    Args:
        threads: How many of them what is measured keeps busy.
    """

    def __init__(self, threads: int) -> None:
        self._threads = threads
        self._busy, self._own, self._start = _busy_s(), time.process_time(), time.perf_counter()

    def share(self) -> float:
        """Return the share of `threads` processors that others kept from this process, 0 to 1."""
        busy = _busy_s()
        if busy is None or self._busy is None:
            return 0.0
        elapsed = time.perf_counter() - self._start
        own = time.process_time() - self._own
        others = max(0.0, busy - self._busy - own) / max(elapsed, 1e-9)
        return lost(others, self._threads, len(_processors()))


class OthersOnDisk:
    """Watches the disk that holds a file, from its making on.

    Args:
        path: The file.
        stat: Where the kernel counts, if not for this disk.
    """

    def __init__(self, path: Path, stat: Path | None = None) -> None:
        device = path.stat().st_dev
        numbers = f"{os.major(device)}:{os.minor(device)}"
        self._stat = stat or Path(f"/sys/dev/block/{numbers}/stat")
        self._moved = _moved_bytes(self._stat)

    def share(self, own: int) -> float:
        """Return the share of what was moved since that was not among one's `own` bytes."""
        moved = _moved_bytes(self._stat)
        if moved is None or self._moved is None or moved <= self._moved:
            return 0.0
        total = moved - self._moved
        return max(0, total - own) / total


def lost(others: float, threads: int, processors: int) -> float:
    """Return the share of `threads` processors that is missing while others use `others` of all."""
    return min(1.0, max(0.0, others + threads - processors) / threads)


def _processors() -> set[int]:
    return os.sched_getaffinity(0)


def _busy_s(stat: Path | None = None) -> float | None:
    """Return the seconds that this process's processors were busy since they were started."""
    try:
        lines = (stat or _STAT).read_text().splitlines()
    except OSError:
        return None
    wanted = {f"cpu{number}" for number in _processors()}
    found = [line.split() for line in lines if line.partition(" ")[0] in wanted]
    try:
        ticks = [[int(text) for text in line[1 : 1 + _COLUMNS]] for line in found]
    except ValueError:
        return None
    if not ticks:
        return None
    busy = sum(n for line in ticks for column, n in enumerate(line) if column not in _IDLE)
    return busy / _TICKS


def _moved_bytes(stat: Path) -> int | None:
    """Return what a disk has read and written; None where nothing counts it."""
    try:
        columns = stat.read_text().split()
        return (int(columns[_SECTORS_READ]) + int(columns[_SECTORS_WRITTEN])) * _SECTOR
    except (OSError, ValueError, IndexError):  # of a filesystem over several disks, or none
        return None
