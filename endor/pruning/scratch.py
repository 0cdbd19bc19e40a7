"""A folder for finished layers that goes away with the process that made it."""

import fcntl
import os
import re
import shutil
import tempfile
import time
from pathlib import Path

PREFIX = "endor-prune-"
_LOCK_NAME = ".lock"
_OURS = re.compile(r"\.lock|layer-\d{5}\.safetensors|tmp\w+")
_OLD_SECONDS = 3600.0


class ScratchFolder:
    """A new folder below the system's temporary directory.

    It holds a lock for as long as the process lives, so that a later run can tell what a killed one
    left, and removes it.

    Attributes:
        path: The folder.
    """

    def __init__(self) -> None:
        remove_stale_folders()
        while True:
            self.path = Path(tempfile.mkdtemp(prefix=PREFIX))
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
            self._lock = os.open(self.path / _LOCK_NAME, flags, 0o600)
            fcntl.flock(self._lock, fcntl.LOCK_EX)
            if self.path.exists():
                return
            os.close(self._lock)  # a cleaner took the lock, and the folder, before us

    def remove(self) -> None:
        """Remove the folder; does nothing the second time."""
        if self._lock >= 0:
            shutil.rmtree(self.path, ignore_errors=True)
            os.close(self._lock)
            self._lock = -1


def remove_stale_folders() -> list[Path]:
    """Remove the scratch folders of this user's killed processes, and return their paths.

    A folder with anything in it that is no scratch file stays.
    """
    removed = []
    for path in sorted(Path(tempfile.gettempdir()).glob(f"{PREFIX}*")):
        try:
            if path.is_symlink() or path.stat().st_uid != os.geteuid():
                continue
            names = {item.name for item in path.iterdir()}
            if _is_abandoned(path, names):
                shutil.rmtree(path)
                removed.append(path)
        except OSError:  # another process is faster, or it is no folder
            continue
    return removed


def _is_abandoned(path: Path, names: set[str]) -> bool:
    """Whether nobody holds the lock of a folder in which there are scratch files only."""
    if not all(_OURS.fullmatch(name) for name in names):
        return False
    if _LOCK_NAME not in names:  # a kill, or the moment, between the folder and its lock
        return not names and time.time() - path.stat().st_mtime > _OLD_SECONDS
    flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    lock = os.open(path / _LOCK_NAME, flags)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        return False
    finally:
        os.close(lock)
