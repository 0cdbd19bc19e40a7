"""An output directory that appears whole or not at all, and can be continued.

Everything is written below `OUT.partial` beside OUT, which nobody else may enter:

    OUT.partial/journal.jsonl   what the result depends on; what will be written; finished files
    OUT.partial/content/        what becomes OUT, by one rename
    OUT.partial/replaced/       what was OUT, between that rename and its removal

So what a killed process leaves is `OUT.partial` only. The next run with the same OUT puts things
right: it gives a checkpoint that was being replaced its name back, removes what is left of a run
that had published, and with `resume` goes on behind the last finished file.

Endor removes what it wrote, by name and never through a link. A directory called `OUT.partial` that
is not its own is refused: without its journal, of another owner, behind a link, with strangers.
"""

import contextlib
import fcntl
import json
import os
import re
import stat
import warnings
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from endor.checkpoint.manifest import Writes, name_some, replaceable
from endor.errors import CheckpointError, EndorError, EndorWarning, OutputExistsError
from endor.jsontext import parse_object
from endor.storage.temporary import TEMPORARY_NAME, sync_directory
from endor.storage.tree import list_tree, open_directory, remove_tree

JOURNAL_NAME = "journal.jsonl"
CONTENT_NAME = "content"
REPLACED_NAME = "replaced"

_HEAD = {"endor journal": 1}
"""Members of every journal's first line, by which it is known."""

_START = b'{"endor journal":1,'
_SHARD = re.compile(r"endor-\d{5}(-of-\d{5})?\.safetensors")
_COUNT = re.compile(r"(?<=^endor-\d{5})-of-\d{5}(?=\.safetensors$)")
"""What a shard's name gains once the number of shards is known."""


class OutputDirectory:
    """The directory under construction; a context manager.

    An exception leaves `OUT.partial` for `resume` when it holds finished files, else removes it.

    Args:
        out: The directory to make; a link to an empty directory stands for that directory.
        identity: What the result depends on, as JSON values; a resumed run must have the same.
        source: The directory or file that is read; it must not be replaced.
        writes: What will be written to `folder`, besides shards; None if that is not known yet, as
            it may be for `check`.
        resume: Go on with what an earlier run left, if there is any.
        overwrite: Replace OUT, and drop what an earlier run left.

    Attributes:
        out: The final directory, absolute.
        folder: Where the files go until then.
        finished: Entries of the files that are complete.

    Raises:
        OutputExistsError: OUT exists, or an unfinished run lies beside it, and neither `resume` nor
            `overwrite` says what to do about it; or it holds files that Endor did not write.
        CheckpointError: the unfinished run had another source or other options, another process is
            writing, or OUT or OUT.partial is no place for a checkpoint.
        OSError: from the file system.
    """

    def __init__(
        self,
        out: Path,
        *,
        identity: Mapping[str, Any],
        source: Path,
        writes: Writes | None = None,
        resume: bool = False,
        overwrite: bool = False,
    ) -> None:
        self.out = _target(Path(out))
        self.partial = self.out.with_name(self.out.name + ".partial")
        self.folder = self.partial / CONTENT_NAME
        self.finished: list[dict[str, Any]] = []
        self._identity = _HEAD | json.loads(json.dumps(identity))
        self._source = source
        self._planned = writes is not None
        self._writes = dict(writes or {})
        self._known: set[str] = set(self._writes)
        self._resume = resume
        self._overwrite = overwrite
        self._directory = self._journal = -1
        self._uid = os.geteuid()
        self._fresh = False
        self._parents: list[Path] = []

    def __enter__(self) -> Self:
        try:
            self._look()
            check_target(self.out, self._writes, overwrite=self._overwrite)
            if self._journal < 0:
                self._make()
            self._begin()
        except BaseException:
            self._leave()
            raise
        return self

    def check(self) -> None:
        """Raise what entering would raise now, short of the identity; begin nothing."""
        try:
            self._look()
            if self._planned or not self._overwrite:
                check_target(self.out, self._writes, overwrite=self._overwrite)
            if self._journal >= 0:
                self._check_unfinished(self._read()[0])
        finally:
            self._close()

    def _look(self) -> None:
        """Open what an earlier run left, if there is anything, and put it right."""
        check_source(self.out, self._source)
        if os.path.lexists(self.partial):
            self._open()
            self._repair()

    # ---- OUT.partial ---------------------------------------------------------------------------

    def _make(self) -> None:
        missing = [folder for folder in self.out.parents if not folder.exists()]
        for folder in reversed(missing):
            folder.mkdir(exist_ok=True)
            self._parents.insert(0, folder)
        try:
            self.partial.mkdir(mode=0o700)
        except FileExistsError:
            raise self._busy() from None
        try:
            self._uid = self.partial.lstat().st_uid  # where root is nobody, for one
            self._open()
        except BaseException:
            with contextlib.suppress(OSError):
                self.partial.rmdir()
            raise
        self._fresh = True

    def _open(self) -> None:
        """Open `OUT.partial` and lock its journal, if both are ours."""
        try:
            self._directory = open_directory(self.partial)
        except NotADirectoryError:
            raise self._foreign("is no directory") from None
        except OSError as error:
            if self.partial.is_symlink():
                raise self._foreign("is a link") from None
            raise error
        if os.fstat(self._directory).st_uid != self._uid:
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
            raise OSError(error.errno, error.strerror, str(self._path(JOURNAL_NAME))) from error
        found = os.fstat(self._journal)
        if not stat.S_ISREG(found.st_mode) or found.st_nlink > 1 or found.st_uid != self._uid:
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
            ) and os.path.samestat(os.fstat(self._directory), self.partial.lstat())
        except (BlockingIOError, FileNotFoundError):
            raise self._busy() from None
        if not same:
            raise self._busy()

    def _check_journal(self, names: set[str]) -> None:
        """Raise unless the journal is ours, and everything beside it."""
        lines, _ = self._read()
        if not lines:
            start = os.pread(self._journal, len(_START), 0)
            torn = _START.startswith(start) or start == _START
            if not torn or self._files(CONTENT_NAME) or names - {JOURNAL_NAME, CONTENT_NAME}:
                raise self._foreign(f"{JOURNAL_NAME} is not Endor's")
            return
        if lines[0].get("endor journal") != 1:
            raise self._foreign(f"{JOURNAL_NAME} is not Endor's")
        for line in lines[1:]:
            self._known |= _names(line.get("writes"))
        strangers = sorted(names - {JOURNAL_NAME, CONTENT_NAME, REPLACED_NAME})
        strangers += [
            f"{CONTENT_NAME}/{name}"
            for name, is_file in self._files(CONTENT_NAME)
            if not (name.endswith("/") or (is_file and self._ours(name)))
        ]
        if strangers:
            raise OutputExistsError(
                f"{self.partial}: holds {name_some(strangers)}, which Endor did not write; move "
                "that away, or choose another OUT"
            )

    def _busy(self) -> CheckpointError:
        return CheckpointError(
            f"{self.partial}: another process is writing it; wait for it, or choose another OUT"
        )

    def _foreign(self, why: str) -> OutputExistsError:
        return OutputExistsError(
            f"{self.partial}: {why}, and Endor needs this name while it writes {self.out.name}; "
            "move it away, or choose another OUT"
        )

    def _ours(self, name: str) -> bool:
        """Whether a file in the content is one that Endor writes."""
        return (
            name in self._known
            or bool(_SHARD.fullmatch(name))
            or bool(TEMPORARY_NAME.fullmatch(name))
        )

    def _files(self, name: str) -> list[tuple[str, bool]]:
        """Return what lies below a directory in `OUT.partial`; nothing when there is none."""
        with self._below(name) as fd:
            return [] if fd is None else [(found.name, found.is_file) for found in list_tree(fd)]

    @contextlib.contextmanager
    def _below(self, name: str) -> Iterator[int | None]:
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

    def _repair(self) -> None:
        """Finish what a killed run had begun to publish, or take it back."""
        lines, _ = self._read()
        if not lines:
            self._remove()
            return
        publishing = next((line for line in reversed(lines) if "publishing" in line), None)
        if publishing is None:
            return
        if not os.path.lexists(self.folder):
            self._clean(publishing["publishing"])
        elif os.path.lexists(self._path(REPLACED_NAME)):
            if os.path.lexists(self.out):
                raise OutputExistsError(
                    f"{self._path(REPLACED_NAME)}: is what {self.out} held when an earlier run was "
                    "killed while it replaced it, and there is a new one; move one of them away"
                )
            self._rename(REPLACED_NAME, self.out)
            sync_directory(self.out.parent)

    def _begin(self) -> None:
        lines, nbytes = self._read()
        self._check_unfinished(lines)
        kept: set[str] = set()
        if lines and self._resume:
            self._check_identity(lines[0])
            self.finished = [line for line in lines if "file" in line]
            kept = {str(entry["file"]) for entry in self.finished}
            os.ftruncate(self._journal, nbytes)
            self._empty(kept)
        else:
            self._fresh = True
            self._empty(kept)
            os.ftruncate(self._journal, 0)
            self._append(self._identity)
        with contextlib.suppress(FileExistsError):
            os.mkdir(CONTENT_NAME, dir_fd=self._directory)
        self._append({"writes": sorted(self._writes)})
        sync_directory(self.partial)

    def _check_unfinished(self, lines: list[dict[str, Any]]) -> None:
        count = sum("file" in line for line in lines)
        if count and not self._resume and not self._overwrite:
            raise OutputExistsError(
                f"{self.partial}: an unfinished run left {count} files here; add --resume to go on "
                "with it, or --overwrite to start again"
            )

    def _empty(self, kept: set[str]) -> None:
        """Remove what Endor wrote into the content, but files in `kept` under either name."""
        with self._below(CONTENT_NAME) as fd:
            if fd is not None:
                remove_tree(fd, lambda name: self._ours(name) and _COUNT.sub("", name) not in kept)

    def _check_identity(self, found: Mapping[str, Any]) -> None:
        for key in sorted(self._identity.keys() | found.keys()):
            if found.get(key) != self._identity.get(key):
                raise CheckpointError(
                    f"{self.partial}: cannot be resumed: {key} was {_brief(found.get(key))} and is "
                    f"now {_brief(self._identity.get(key))}; run with the same input and options, "
                    "or add --overwrite instead of --resume to start again"
                )

    # ---- writing -------------------------------------------------------------------------------

    def adopt(self, name: str) -> Path:
        """Return the path of a finished file, which must still be a file of ours.

        Raises:
            CheckpointError: It is not.
        """
        path = self.folder / name
        try:
            found = path.lstat()
        except FileNotFoundError:
            raise CheckpointError(f"{path}: is missing; start again with --overwrite") from None
        if not stat.S_ISREG(found.st_mode) or found.st_uid != self._uid:
            raise CheckpointError(f"{path}: was changed; start again with --overwrite")
        return path

    def finish_file(self, entry: Mapping[str, Any]) -> None:
        """Note in the journal that the file `entry["file"]` is complete and on disk."""
        self._append(entry)
        self.finished.append(dict(entry))

    def _append(self, entry: Mapping[str, Any]) -> None:
        line = (json.dumps(entry, separators=(",", ":")) + "\n").encode()
        try:
            while line:
                line = line[os.write(self._journal, line) :]
            os.fsync(self._journal)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self._path(JOURNAL_NAME))) from error

    def _read(self) -> tuple[list[dict[str, Any]], int]:
        """Return the whole lines and their length; a last one that was cut short is ignored."""
        with open(os.dup(self._journal), "rb") as file:  # noqa: PTH123 - a descriptor
            file.seek(0)
            content = file.read()
        lines, nbytes = [], 0
        for line in content.splitlines(keepends=True):
            if not line.endswith(b"\n"):
                break
            try:
                lines.append(parse_object(line, str(self._path(JOURNAL_NAME))))
            except EndorError:
                break
            nbytes += len(line)
        return lines, nbytes

    def _path(self, name: str) -> Path:
        return self.partial / name

    # ---- publishing ----------------------------------------------------------------------------

    def publish(self, names: Collection[str]) -> None:
        """Give the directory its name.

        Args:
            names: Every file in `folder`; any other, or a missing one, is an error.

        An error means that OUT is as it was. Once it has its name the run has succeeded, and what
        cannot be tidied up after that is a warning.

        Warns:
            EndorWarning: OUT is complete, and something was left beside it.
        """
        found = {name for name, _ in self._files(CONTENT_NAME)}
        if found != set(names):
            odd = name_some(sorted(found ^ set(names)))
            raise CheckpointError(
                f"{self.folder}: {odd} was added or removed while the checkpoint was written; "
                "start again with --overwrite"
            )
        replaced = check_target(self.out, self._writes, overwrite=self._overwrite)
        _sync_tree(self.folder)
        sync_directory(self.partial)
        self._append({"publishing": sorted(replaced)})
        self._parents = []
        if replaced:
            os.rename(self.out, REPLACED_NAME, dst_dir_fd=self._directory)
        try:
            self._rename(CONTENT_NAME, self.out)
        except BaseException:
            if replaced:
                self._rename(REPLACED_NAME, self.out)
            raise
        try:
            sync_directory(self.out.parent)
            self._clean(sorted(replaced))
        except (OSError, EndorError) as error:
            warnings.warn(
                f"{self.out}: is complete, but tidying up failed ({error}); what is left lies in "
                f"{self.partial}",
                EndorWarning,
                stacklevel=2,
            )
        self._close()

    def _rename(self, name: str, target: Path) -> None:
        """Move a directory out of `OUT.partial`."""
        try:
            os.rename(name, target, src_dir_fd=self._directory)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(target)) from error

    def _clean(self, replaced: object) -> None:
        """Remove `OUT.partial` after its content was published."""
        names = _names(replaced)
        with self._below(REPLACED_NAME) as fd:
            left = remove_tree(fd, names.__contains__) if fd is not None else []
        if left:
            raise OutputExistsError(
                f"{self._path(REPLACED_NAME)}: holds {name_some(left)}, which Endor did not write; "
                "move that away, then remove the directory"
            )
        self._remove()

    def _remove(self) -> None:
        """Remove `OUT.partial`, in which only empty directories and the journal are left."""
        for name in (REPLACED_NAME, CONTENT_NAME):
            with contextlib.suppress(FileNotFoundError):
                os.rmdir(name, dir_fd=self._directory)
        # The journal last: without it the directory would be a stranger's.
        os.unlink(JOURNAL_NAME, dir_fd=self._directory)
        self.partial.rmdir()
        self._close()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._leave()

    def _leave(self) -> None:
        """Keep what can be resumed, and remove the rest."""
        try:
            if self._journal >= 0 and self._fresh and not self.finished:
                with contextlib.suppress(OSError, EndorError):
                    self._empty(set())
                    self._remove()
        finally:
            self._close()
        for folder in self._parents:
            with contextlib.suppress(OSError):
                folder.rmdir()

    def _close(self) -> None:
        for fd in (self._journal, self._directory):
            if fd >= 0:
                with contextlib.suppress(OSError):
                    os.close(fd)
        self._journal = self._directory = -1


def check_output(
    out: Path | str,
    source: Path | str,
    *,
    writes: Writes | None = None,
    resume: bool = False,
    overwrite: bool = False,
) -> None:
    """Raise what `OutputDirectory` would, before hours of work; puts right what a kill left.

    Raises:
        OutputExistsError, CheckpointError, OSError: See `OutputDirectory`.
    """
    OutputDirectory(
        Path(out),
        identity={},
        source=Path(source),
        writes=writes,
        resume=resume,
        overwrite=overwrite,
    ).check()


def output_path(out_dir: Path | str) -> Path:
    """Return the directory to make; `/` and `..` have no place beside them to work in."""
    out = Path(os.path.abspath(out_dir))  # noqa: PTH100 - resolve() would follow OUT's own link
    if not out.name:
        raise CheckpointError(f"{out}: is no place for a checkpoint; choose a directory below it")
    return Path(out_dir)


def check_source(out: Path, source: Path) -> None:
    """Raise `CheckpointError` when writing to `out` would destroy `source`."""
    partial = out.with_name(out.name + ".partial")
    inputs = [source.resolve()]
    if source.is_dir():
        inputs += [
            path.resolve() for path in source.iterdir() if path.is_symlink() and path.is_file()
        ]
    for path in inputs:
        homes = [path, *path.parents]
        for folder in (out, partial):
            if folder.resolve() in homes or _is_one_of(folder, homes):
                raise CheckpointError(
                    f"{folder}: holds the input {source}; choose another OUT"
                    if folder is out
                    else f"{folder}: holds the input {source}, and Endor needs this name while it "
                    f"writes {out.name}; choose another OUT"
                )


def check_target(out: Path, writes: Writes, *, overwrite: bool) -> frozenset[str]:
    """Return the names of the files in OUT that are to be replaced, all of which are Endor's.

    Raises:
        OutputExistsError, CheckpointError: See `OutputDirectory`.
    """
    if not os.path.lexists(out):
        return frozenset()
    if out.is_symlink() or not out.is_dir():
        raise OutputExistsError(f"{out}: exists and is no directory; choose another OUT")
    if out.is_mount():
        raise CheckpointError(f"{out}: is a mount point; choose a directory below it")
    if not any(out.iterdir()):
        return frozenset()
    if not overwrite:
        raise OutputExistsError(
            f"{out}: exists already; choose another OUT, or add --overwrite to replace it"
        )
    return replaceable(out, writes)


def _target(out: Path) -> Path:
    """Return the absolute directory that `out` means: OUT's own link is followed if that is safe.

    Raises:
        OutputExistsError: OUT is a link to something else than an empty directory.
        CheckpointError: OUT is the root.
    """
    absolute = out.absolute()
    if ".." in absolute.parts:
        absolute = absolute.resolve()
    if not absolute.name:
        raise CheckpointError(f"{out}: is the root of the file system; choose a directory below it")
    if not absolute.is_symlink():
        return absolute
    real = absolute.resolve()
    if real.is_dir() and not any(real.iterdir()):
        return real
    raise OutputExistsError(
        f"{out}: is a link to {real}, and only one to an empty directory can be OUT; give that "
        "path itself, or choose another OUT"
    )


def _is_one_of(folder: Path, homes: list[Path]) -> bool:
    """Whether `folder` is one of `homes` by another name, as behind a bind mount."""
    try:
        found = folder.stat()
    except OSError:
        return False
    return any(home.exists() and os.path.samestat(found, home.stat()) for home in homes)


def _sync_tree(folder: Path) -> None:
    """Make everything below `folder` survive a power cut."""
    for path in [*folder.rglob("*"), folder]:
        flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW
        fd = os.open(path, flags)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def _names(value: object) -> set[str]:
    """Return the names in a list of a journal."""
    return {name for name in value if isinstance(name, str)} if isinstance(value, list) else set()


def _brief(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
