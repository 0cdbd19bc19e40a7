"""Looking into a directory, and emptying it, by descriptor and never through a link."""

import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

MAX_DEPTH = 32
"""Directories below directories; what lies deeper is reported and never touched."""


class Found(NamedTuple):
    """Something below a directory.

    Attributes:
        name: Relative, with `/` between parts; ends with `/` for a directory that is not looked
            into, because it is empty or too deep.
        is_file: Whether it is a regular file (a link never is).
    """

    name: str
    is_file: bool


def open_directory(path: Path | str, *, dir_fd: int | None = None) -> int:
    """Return a descriptor of the directory `path`, which must not be a link.

    Raises:
        OSError: There is none, or it is something else (ENOTDIR, ELOOP).
    """
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    return os.open(path, flags, dir_fd=dir_fd)


def list_tree(fd: int) -> list[Found]:
    """Return everything below the directory `fd`, sorted by name."""
    return sorted(_walk(fd, "", 0))


def remove_tree(fd: int, ours: Callable[[str], bool]) -> list[str]:
    """Remove the files below the directory `fd` that are ours, and directories left empty.

    Args:
        fd: The directory, which itself stays.
        ours: Says so of a file's relative name. What is no regular file is never ours.

    Returns:
        The names of what stays, sorted.

    Raises:
        OSError: Something cannot be removed.
    """
    return sorted(_remove(fd, ours, "", 0))


def _walk(fd: int, prefix: str, depth: int) -> Iterator[Found]:
    for name in os.listdir(fd):
        mode = os.stat(name, dir_fd=fd, follow_symlinks=False).st_mode
        if not stat.S_ISDIR(mode):
            yield Found(prefix + name, stat.S_ISREG(mode))
            continue
        if depth == MAX_DEPTH:
            yield Found(f"{prefix}{name}/", False)
            continue
        below = open_directory(name, dir_fd=fd)
        try:
            found = list(_walk(below, f"{prefix}{name}/", depth + 1))
        finally:
            os.close(below)
        yield from found or [Found(f"{prefix}{name}/", False)]


def _remove(fd: int, ours: Callable[[str], bool], prefix: str, depth: int) -> list[str]:
    left = []
    for name in os.listdir(fd):
        mode = os.stat(name, dir_fd=fd, follow_symlinks=False).st_mode
        if stat.S_ISDIR(mode) and depth < MAX_DEPTH:
            below = open_directory(name, dir_fd=fd)
            try:
                strangers = _remove(below, ours, f"{prefix}{name}/", depth + 1)
            finally:
                os.close(below)
            if strangers:
                left += strangers
            else:
                os.rmdir(name, dir_fd=fd)
        elif stat.S_ISREG(mode) and ours(prefix + name):
            os.unlink(name, dir_fd=fd)
        else:
            left.append(prefix + name)
    return left
