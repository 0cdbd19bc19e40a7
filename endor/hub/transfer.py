"""One file of a model on the Hub to disk: in pieces, from where it stopped, and checked."""

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

from endor.errors import ChecksumError, HubError
from endor.hub.client import BrokenOff, Repository, opened, patiently

_READ_BYTES = 8 << 20
_TRIES = 2
"""Times that a file is fetched whole when its content is wrong."""


class Cancelled(HubError):
    """Nobody waits for the file any more."""


def fetch(
    repository: Repository,
    file: str,
    target: Path,
    *,
    wait: Callable[[float], bool],
) -> None:
    """Write a file of a model to `target`, which appears when it is whole and checked.

    What was written of it before, in `target` with `.part` behind its name, is kept and continued.
    A connection that ends, and a Hub that is busy, are tried again, for as long as more comes.

    Args:
        repository: The model.
        file: Which of its files.
        target: Where to.
        wait: Waits so many seconds (0 to ask only); true when the file is not wanted any more.

    Raises:
        ChecksumError: What came has another hash than the Hub says, twice.
        HubError: It cannot be had.
        Cancelled: `wait` said so.
        OSError: The disk is full, or cannot be written.
    """
    about = repository.files[file]
    part = target.with_name(f"{target.name}.part")
    for attempt in range(1, _TRIES + 1):
        found = _complete(repository, file, part, wait)
        if about.sha256 in (None, found):
            part.replace(target)
            return
        part.unlink()
        if attempt == _TRIES:
            raise ChecksumError(
                f"{repository.name}: {file}: its sha256 must be {about.sha256}, got {found}, and "
                "again when it was fetched once more; it is damaged on the Hub or on the way"
            )


def _complete(repository: Repository, file: str, part: Path, wait: Callable[[float], bool]) -> str:
    """Write what is missing of a file; return the sha256 of all of it."""
    nbytes = repository.files[file].nbytes
    digest = hashlib.sha256()
    with part.open("ab+") as out:
        out.seek(0)
        have = os.fstat(out.fileno()).st_size
        if have > nbytes:
            out.truncate(0)
            have = 0
        while piece := out.read(_READ_BYTES):
            digest.update(piece)

        def more() -> None:
            """Write until the end, or until the connection ends; raise in that case."""
            nonlocal have
            with opened(repository, file, have, nbytes) as pieces:
                for piece in pieces:
                    if wait(0):
                        raise Cancelled(f"{repository.name}: {file}: not wanted any more")
                    if have + len(piece) > nbytes:
                        raise HubError(f"{repository.name}: {file}: more came than its {nbytes}")
                    _write(out.fileno(), piece, part)
                    digest.update(piece)
                    have += len(piece)
            if have < nbytes:
                raise BrokenOff(
                    f"{repository.name}: {file}: the connection ended after {have} of {nbytes} "
                    "bytes; the same command with --resume goes on"
                )

        while have < nbytes:
            before = have
            try:
                patiently(more, wait=wait)
            except BrokenOff:
                if have == before:
                    raise
        os.fsync(out.fileno())
    return digest.hexdigest()


def _write(fd: int, piece: bytes, path: Path) -> None:
    try:
        view = memoryview(piece)
        while view:
            view = view[os.write(fd, view) :]
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
