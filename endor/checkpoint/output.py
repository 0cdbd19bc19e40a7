"""An output directory that appears whole or not at all, and can be continued.

Everything is written to `OUT.partial` beside OUT. Its journal begins with what the result depends
on (options and the identity of the source); each finished file adds a line once it is safely on
disk. At the end the directory is renamed to OUT. What a killed process leaves is therefore
`OUT.partial` only, and a later run with `resume` goes on behind the last finished file.
"""

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from endor.errors import CheckpointError, FormatError, OutputExistsError
from endor.jsontext import parse
from endor.storage import remove_stale_temporaries
from endor.storage.temporary import sync_directory

JOURNAL_NAME = "journal.jsonl"
_MARKERS = ("config.json", "*.safetensors.index.json", "*.safetensors")


class OutputDirectory:
    """The directory under construction; a context manager.

    An exception leaves `OUT.partial` for `resume` when it holds finished files, else removes it.

    Args:
        out: The directory to make.
        identity: What the result depends on, as JSON values; a resumed run must have the same.
        source: The directory or file that is read; it must not be replaced.
        resume: Go on with what an earlier run left, if there is any.
        overwrite: Replace OUT, and drop what an earlier run left.

    Raises:
        OutputExistsError: OUT exists, or an unfinished run lies beside it, and neither `resume` nor
            `overwrite` says what to do about it.
        CheckpointError: the unfinished run had another source or other options, another process is
            writing, or OUT is no place for a checkpoint.
        OSError: from the file system.
    """

    def __init__(
        self,
        out: Path,
        *,
        identity: Mapping[str, Any],
        source: Path,
        resume: bool = False,
        overwrite: bool = False,
    ) -> None:
        self.out = Path(os.path.abspath(out))  # noqa: PTH100 - resolve() would follow OUT's own link
        self.partial = self.out.with_name(self.out.name + ".partial")
        self.finished: list[dict[str, Any]] = []
        self._identity = json.loads(json.dumps(identity))
        self._source = source
        self._resume = resume
        self._overwrite = overwrite
        self._journal = -1

    def __enter__(self) -> Self:
        self._check_target()
        self.out.parent.mkdir(parents=True, exist_ok=True)
        self.partial.mkdir(exist_ok=True)
        journal = self.partial / JOURNAL_NAME
        self._journal = os.open(journal, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(self._journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._begin(journal)
        except BlockingIOError:
            self._close()
            raise CheckpointError(
                f"{self.partial}: another process is writing it; wait for it, or choose another OUT"
            ) from None
        except BaseException:
            self._close()
            raise
        return self

    def _check_target(self) -> None:
        source = self._source.resolve()
        target = self.out.resolve()
        if target == source or target in source.parents:
            raise CheckpointError(f"{self.out}: holds the input {self._source}; choose another OUT")
        if not os.path.lexists(self.out):
            return
        if not self.out.is_dir():
            raise OutputExistsError(f"{self.out}: exists and is no directory; choose another OUT")
        if self.out.is_mount():
            raise CheckpointError(f"{self.out}: is a mount point; choose a directory below it")
        if not any(self.out.iterdir()):
            return
        if not self._overwrite:
            raise OutputExistsError(
                f"{self.out}: exists already; choose another OUT, or add --overwrite to replace it"
            )
        if not any(any(self.out.glob(marker)) for marker in _MARKERS):
            raise OutputExistsError(
                f"{self.out}: holds no checkpoint, so it is not replaced; remove it yourself or "
                "choose another OUT"
            )

    def _begin(self, journal: Path) -> None:
        lines, nbytes = _read_lines(journal)
        if lines and self._resume:
            self._check_identity(lines[0])
            self.finished = lines[1:]
            os.ftruncate(self._journal, nbytes)
            remove_stale_temporaries(self.partial)
            return
        if len(lines) > 1 and not self._overwrite:
            raise OutputExistsError(
                f"{self.partial}: an unfinished run left {len(lines) - 1} files here; add --resume "
                "to go on with it, or --overwrite to start again"
            )
        for path in self.partial.iterdir():
            if path.name != JOURNAL_NAME:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        os.ftruncate(self._journal, 0)
        self._append(self._identity)
        sync_directory(self.partial)

    def _check_identity(self, found: Mapping[str, Any]) -> None:
        for key in sorted(self._identity.keys() | found.keys()):
            if found.get(key) != self._identity.get(key):
                raise CheckpointError(
                    f"{self.partial}: cannot be resumed: {key} was {_brief(found.get(key))} and is "
                    f"now {_brief(self._identity.get(key))}; run with the same input and options, "
                    "or add --overwrite instead of --resume to start again"
                )

    def finish_file(self, entry: Mapping[str, Any]) -> None:
        """Note in the journal that a file is complete and on disk."""
        self._append(entry)
        self.finished.append(dict(entry))

    def _append(self, entry: Mapping[str, Any]) -> None:
        line = json.dumps(entry, separators=(",", ":")) + "\n"
        try:
            os.write(self._journal, line.encode())
            os.fsync(self._journal)
        except OSError as error:
            name = str(self.partial / JOURNAL_NAME)
            raise OSError(error.errno, error.strerror, name) from error

    def publish(self) -> None:
        """Give the directory its name; nothing can fail half way after this."""
        for path in self.partial.iterdir():
            if path.is_file() and path.name != JOURNAL_NAME:
                _sync_file(path)
        sync_directory(self.partial)
        old = self.out.with_name(f"{self.out.name}.replaced.{os.getpid()}")
        replacing = self.out.is_dir() and any(self.out.iterdir())
        if replacing:
            self.out.rename(old)
        try:
            self.partial.rename(self.out)
        except OSError:
            if replacing:
                old.rename(self.out)
            raise
        (self.out / JOURNAL_NAME).unlink()
        sync_directory(self.out.parent)
        self._close()
        if replacing:
            shutil.rmtree(old)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._journal < 0:
            return
        if not self.finished:
            with contextlib.suppress(OSError):
                shutil.rmtree(self.partial)
        self._close()

    def _close(self) -> None:
        if self._journal >= 0:
            os.close(self._journal)
            self._journal = -1


def _read_lines(journal: Path) -> tuple[list[dict[str, Any]], int]:
    """Return the whole lines and their length; a last one that was cut short is ignored."""
    lines, nbytes = [], 0
    for line in journal.read_bytes().splitlines(keepends=True):
        try:
            value = parse(line, str(journal))
        except FormatError:
            break
        if not line.endswith(b"\n") or not isinstance(value, dict):
            break
        lines.append(value)
        nbytes += len(line)
    return lines, nbytes


def _sync_file(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _brief(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
