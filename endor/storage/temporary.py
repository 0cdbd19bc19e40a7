"""Files that appear whole or not at all: a locked temporary one, then a rename."""

import contextlib
import fcntl
import itertools
import os
import re
import stat
import warnings
from pathlib import Path

from endor.errors import EndorWarning

TEMPORARY_NAME = re.compile(r"\..+\.\d+\.\d+\.tmp")
_NAME_LIMIT = 200


class TemporaryFile:
    """A new file in the target's directory, named `.<target>.<pid>.<n>.tmp`.

    Its maker holds a lock on it for as long as it lives, so `remove_stale_temporaries` can tell
    what a killed process left from what another one is writing.

    Attributes:
        target: The final name.
        path: The present name.
        fd: Descriptor, open for reading and writing.
    """

    def __init__(self, target: Path) -> None:
        self.target = target
        self._there = True
        if target.is_dir():
            raise IsADirectoryError(21, "is a directory, a file was expected", str(target))
        for attempt in itertools.count():
            name = f".{target.name[:_NAME_LIMIT]}.{os.getpid()}.{attempt}.tmp"
            self.path = target.with_name(name)
            try:
                flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
                self.fd = os.open(self.path, flags, 0o666)
            except FileExistsError:
                continue
            if self._lock():
                return
            os.close(self.fd)

    def _lock(self) -> bool:
        """Take the lock; False when a cleaner was faster and has removed the file."""
        try:
            fcntl.flock(self.fd, fcntl.LOCK_EX)
            return os.fstat(self.fd).st_ino == self.path.stat().st_ino
        except FileNotFoundError:
            return False

    def suspend(self) -> None:
        """Close the file for a while: its lock goes too, so only in a directory that is locked."""
        self.close()

    def resume(self) -> None:
        """Open the file again after `suspend`."""
        if self.fd < 0:
            self.fd = os.open(self.path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)

    def commit(self) -> None:
        """Give the file its final name, so that it survives a power cut; then close it.

        Warns:
            EndorWarning: The file is complete, but its name may not survive a power cut.
        """
        os.fsync(self.fd)
        self.path.replace(self.target)
        self._there = False
        try:
            sync_directory(self.target.parent)
        except OSError as error:
            warnings.warn(
                f"{self.target}: is complete, but its directory could not be flushed to the disk "
                f"({error})",
                EndorWarning,
                stacklevel=2,
            )
        with contextlib.suppress(OSError):  # flushed before
            self.close()

    def discard(self) -> None:
        """Remove the file; does nothing after a commit."""
        if self._there:
            self._there = False
            with contextlib.suppress(OSError):
                self.path.unlink()
        self.close()

    def close(self) -> None:
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)


def sync_directory(directory: Path) -> None:
    """Make the names in `directory` survive a power cut."""
    fd = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def remove_stale_temporaries(directory: Path, target: str | None = None) -> list[Path]:
    """Remove what killed writers left in `directory`, and return the removed paths.

    A file that a living process is still writing stays, and so does one of another user, or one
    with a second name.

    Args:
        directory: Where to look.
        target: Only what was to become the file of this name.
    """
    start = None if target is None else f".{target[:_NAME_LIMIT]}."
    removed = []
    for path in sorted(directory.iterdir()):
        if not TEMPORARY_NAME.fullmatch(path.name):
            continue
        if start is not None and not path.name.startswith(start):
            continue
        try:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        except OSError:
            continue
        try:
            found = os.fstat(fd)
            ours = stat.S_ISREG(found.st_mode) and found.st_uid == os.geteuid()
            if ours and found.st_nlink == 1:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()
                removed.append(path)
        except OSError:
            pass
        finally:
            os.close(fd)
    return removed
