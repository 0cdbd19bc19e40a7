"""The directory in which an output is written: `OUT.partial`, its lock, its journal."""

import contextlib
import fcntl
import json
import os
import re
import stat
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from endor.checkpoint.manifest import name_some
from endor.errors import BusyError, EndorError, OutputExistsError
from endor.jsontext import parse_object
from endor.storage.temporary import TEMPORARY_NAME
from endor.storage.tree import list_tree, open_directory, remove_tree

JOURNAL_NAME = "journal.jsonl"
CONTENT_NAME = "content"
REPLACED_NAME = "replaced"
SOURCE_NAME = "source"

HEAD = {"endor journal": 1}
"""Members of every journal's first line, by which it is known."""

_START = b'{"endor journal":1,'
_SHARD = re.compile(r"endor-\d{5}(-of-\d{5})?\.safetensors")
_INPUT = re.compile(r"shard-\d{5}(\.part)?")
_COUNT = re.compile(r"(?<=^endor-\d{5})-of-\d{5}(?=\.safetensors$)")
"""What a shard's name gains once the number of shards is known."""


class Partial:
    """`OUT.partial`: open and locked by one process, with nothing in it but what Endor wrote.

    Args:
        out: The final directory, absolute.
        known: Names that will be written besides shards.

    Attributes:
        path: The directory.
        folder: Its content, which becomes OUT.
        uid: Whose its files are.
    """

    def __init__(self, out: Path, known: Iterable[str]) -> None:
        self.path = out.with_name(out.name + ".partial")
        self.folder = self.path / CONTENT_NAME
        self.uid = os.geteuid()
        self._name = out.name
        self._known = set(known)
        self._directory = self._journal = -1

    @property
    def is_open(self) -> bool:
        """Whether it is there and locked."""
        return self._journal >= 0

    def make(self) -> None:
        """Make and open it.

        Raises:
            CheckpointError: Another process was faster.
        """
        try:
            self.path.mkdir(mode=0o700)
        except FileExistsError:
            raise self._busy() from None
        try:
            self.uid = self.path.lstat().st_uid  # where root is nobody, for one
            self.open()
        except BaseException:
            with contextlib.suppress(OSError):
                self.path.rmdir()
            raise

    def open(self) -> None:
        """Open `OUT.partial` and lock its journal, if both are ours."""
        try:
            self._directory = open_directory(self.path)
        except NotADirectoryError:
            raise self._foreign("is no directory") from None
        except OSError as error:
            if self.path.is_symlink():
                raise self._foreign("is a link") from None
            raise error
        if os.fstat(self._directory).st_uid != self.uid:
            raise self._foreign("belongs to another user")
        names = set(os.listdir(self._directory))  # noqa: PTH208 - a descriptor
        if names and JOURNAL_NAME not in names:
            raise self._foreign(f"holds no journal of Endor's, but {name_some(sorted(names))}")
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        try:
            self._journal = os.open(JOURNAL_NAME, flags, 0o600, dir_fd=self._directory)
        except OSError as error:
            if JOURNAL_NAME in names:
                raise self._foreign(f"{JOURNAL_NAME} is no file of Endor's") from None
            raise OSError(error.errno, error.strerror, str(self.at(JOURNAL_NAME))) from error
        found = os.fstat(self._journal)
        if not stat.S_ISREG(found.st_mode) or found.st_nlink > 1 or found.st_uid != self.uid:
            raise self._foreign(f"{JOURNAL_NAME} is no file of Endor's")
        self._lock()
        self._check_journal(names)

    def _lock(self) -> None:
        try:
            fcntl.flock(self._journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Whoever held the lock before may have removed or published all of it.
            same = os.path.samestat(
                os.fstat(self._journal),
                os.stat(JOURNAL_NAME, dir_fd=self._directory, follow_symlinks=False),
            ) and os.path.samestat(os.fstat(self._directory), self.path.lstat())
        except (BlockingIOError, FileNotFoundError):
            raise self._busy() from None
        if not same:
            raise self._busy()

    def _check_journal(self, names: set[str]) -> None:
        """Raise unless the journal is ours, and everything beside it."""
        lines, _ = self.read()
        if not lines:
            start = os.pread(self._journal, len(_START), 0)
            torn = _START.startswith(start) or start == _START
            if not torn or self.files(CONTENT_NAME) or names - {JOURNAL_NAME, CONTENT_NAME}:
                raise self._foreign(f"{JOURNAL_NAME} is not Endor's")
            return
        if lines[0].get("endor journal") != 1:
            raise self._foreign(f"{JOURNAL_NAME} is not Endor's")
        for line in lines[1:]:
            self._known |= names_in(line.get("writes"))
        strangers = sorted(names - {JOURNAL_NAME, CONTENT_NAME, REPLACED_NAME, SOURCE_NAME})
        strangers += [
            f"{CONTENT_NAME}/{name}"
            for name, is_file in self.files(CONTENT_NAME)
            if not (name.endswith("/") or (is_file and self._ours(name)))
        ]
        strangers += [
            f"{SOURCE_NAME}/{name}"
            for name, is_file in self.files(SOURCE_NAME)
            if not (is_file and _INPUT.fullmatch(name))
        ]
        if strangers:
            raise OutputExistsError(
                f"{self.path}: holds {name_some(strangers)}, which Endor did not write; move "
                "that away, or choose another OUT"
            )

    def _busy(self) -> BusyError:
        return BusyError(
            f"{self.path}: another process is writing it; wait for it, or choose another OUT"
        )

    def _foreign(self, why: str) -> OutputExistsError:
        return OutputExistsError(
            f"{self.path}: {why}, and Endor needs this name while it writes {self._name}; "
            "move it away, or choose another OUT"
        )

    def _ours(self, name: str) -> bool:
        """Whether a file in the content is one that Endor writes."""
        return (
            name in self._known
            or bool(_SHARD.fullmatch(name))
            or bool(TEMPORARY_NAME.fullmatch(name))
        )

    def files(self, name: str) -> list[tuple[str, bool]]:
        """Return what lies below a directory in `OUT.partial`; nothing when there is none."""
        with self.below(name) as fd:
            return [] if fd is None else [(found.name, found.is_file) for found in list_tree(fd)]

    @contextlib.contextmanager
    def below(self, name: str) -> Iterator[int | None]:
        try:
            fd = open_directory(name, dir_fd=self._directory)
        except FileNotFoundError:
            yield None
            return
        except OSError:
            raise self._foreign(f"{name} is no directory of Endor's") from None
        try:
            yield fd
        finally:
            os.close(fd)

    def make_content(self) -> None:
        """Make the directory for the content, if it is not there yet."""
        with contextlib.suppress(FileExistsError):
            os.mkdir(CONTENT_NAME, dir_fd=self._directory)

    def empty(self, kept: set[str]) -> None:
        """Remove what Endor wrote into the content, but files in `kept` under either name."""
        with self.below(CONTENT_NAME) as fd:
            if fd is not None:
                remove_tree(fd, lambda name: self._ours(name) and _COUNT.sub("", name) not in kept)

    def drop_input(self) -> None:
        """Remove what was fetched of the input."""
        with self.below(SOURCE_NAME) as fd:
            if fd is not None:
                remove_tree(fd, lambda name: bool(_INPUT.fullmatch(name)))

    # ---- the journal ---------------------------------------------------------------------------

    def append(self, entry: Mapping[str, Any]) -> None:
        line = (json.dumps(entry, separators=(",", ":")) + "\n").encode()
        try:
            while line:
                line = line[os.write(self._journal, line) :]
            os.fsync(self._journal)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.at(JOURNAL_NAME))) from error

    def read(self) -> tuple[list[dict[str, Any]], int]:
        """Return the whole lines and their length; a last one that was cut short is ignored."""
        with open(os.dup(self._journal), "rb") as file:  # noqa: PTH123 - a descriptor
            file.seek(0)
            content = file.read()
        lines, nbytes = [], 0
        for line in content.splitlines(keepends=True):
            if not line.endswith(b"\n"):
                break
            try:
                lines.append(parse_object(line, str(self.at(JOURNAL_NAME))))
            except EndorError:
                break
            nbytes += len(line)
        return lines, nbytes

    def truncate(self, nbytes: int) -> None:
        """Cut the journal."""
        os.ftruncate(self._journal, nbytes)

    # ---- moving and removing -------------------------------------------------------------------

    def at(self, name: str) -> Path:
        return self.path / name

    def take(self, directory: Path, name: str) -> None:
        """Move a directory into `OUT.partial`."""
        os.rename(directory, name, dst_dir_fd=self._directory)

    def give(self, name: str, target: Path) -> None:
        """Move a directory out of `OUT.partial`."""
        try:
            os.rename(name, target, src_dir_fd=self._directory)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(target)) from error

    def remove(self) -> None:
        """Remove `OUT.partial`, in which only empty directories, input and journal are left."""
        self.drop_input()
        for name in (REPLACED_NAME, CONTENT_NAME, SOURCE_NAME):
            with contextlib.suppress(FileNotFoundError):
                os.rmdir(name, dir_fd=self._directory)
        # The journal last: without it the directory would be a stranger's.
        os.unlink(JOURNAL_NAME, dir_fd=self._directory)
        self.path.rmdir()
        self.close()

    def close(self) -> None:
        for fd in (self._journal, self._directory):
            if fd >= 0:
                with contextlib.suppress(OSError):
                    os.close(fd)
        self._journal = self._directory = -1


def names_in(value: object) -> set[str]:
    """Return the names in a list of a journal."""
    return {name for name in value if isinstance(name, str)} if isinstance(value, list) else set()
