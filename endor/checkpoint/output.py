"""An output directory that appears whole or not at all, and can be continued.

Everything is written below `OUT.partial` beside OUT, which nobody else may enter:

    OUT.partial/journal.jsonl   what the result depends on; what will be written; finished files
    OUT.partial/source/         what was fetched of the input, while it is needed
    OUT.partial/content/        what becomes OUT, by one rename
    OUT.partial/replaced/       what was OUT, between that rename and its removal

So what a killed process leaves is `OUT.partial` only. The next run with the same OUT puts things
right: it gives a checkpoint that was being replaced its name back, removes what is left of a run
that had published, and with `resume` goes on behind the last finished file.

Endor removes what it wrote, by name and never through a link. A directory called `OUT.partial` that
is not its own is refused: without its journal, of another owner, behind a link, with strangers.
"""

import contextlib
import json
import os
import stat
import warnings
from collections.abc import Collection, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from endor.checkpoint.manifest import Writes, name_some
from endor.checkpoint.partial import CONTENT_NAME, HEAD, REPLACED_NAME, Partial, names_in
from endor.checkpoint.targets import check_source, check_target, target_of
from endor.errors import CheckpointError, EndorError, EndorWarning, OutputExistsError
from endor.storage.temporary import sync_directory
from endor.storage.tree import remove_tree


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
        self.out = target_of(Path(out))
        self.finished: list[dict[str, Any]] = []
        self._identity = HEAD | json.loads(json.dumps(identity))
        self._source = source
        self._planned = writes is not None
        self._writes = dict(writes or {})
        self._work = Partial(self.out, self._writes)
        self.partial = self._work.path
        self.folder = self._work.folder
        self._resume = resume
        self._overwrite = overwrite
        self._fresh = False
        self._parents: list[Path] = []

    def __enter__(self) -> Self:
        try:
            self._look()
            check_target(self.out, self._writes, overwrite=self._overwrite)
            if not self._work.is_open:
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
            if self._work.is_open:
                self._check_unfinished(self._work.read()[0])
        finally:
            self._work.close()

    def _look(self) -> None:
        """Open what an earlier run left, if there is anything, and put it right."""
        check_source(self.out, self._source)
        if os.path.lexists(self.partial):
            self._work.open()
            self._repair()

    # ---- OUT.partial ---------------------------------------------------------------------------

    def _make(self) -> None:
        missing = [folder for folder in self.out.parents if not folder.exists()]
        for folder in reversed(missing):
            folder.mkdir(exist_ok=True)
            self._parents.insert(0, folder)
        self._work.make()
        self._fresh = True

    def _repair(self) -> None:
        """Finish what a killed run had begun to publish, or take it back."""
        lines, _ = self._work.read()
        if not lines:
            self._work.remove()
            return
        publishing = next((line for line in reversed(lines) if "publishing" in line), None)
        if publishing is None:
            return
        if not os.path.lexists(self.folder):
            self._clean(publishing["publishing"])
        elif os.path.lexists(self._work.at(REPLACED_NAME)):
            if os.path.lexists(self.out):
                raise OutputExistsError(
                    f"{self._work.at(REPLACED_NAME)}: is what {self.out} held when an earlier run "
                    "was killed while it replaced it, and there is a new one; move one of them away"
                )
            self._work.give(REPLACED_NAME, self.out)
            sync_directory(self.out.parent)

    def _begin(self) -> None:
        lines, nbytes = self._work.read()
        self._check_unfinished(lines)
        kept: set[str] = set()
        if lines and self._resume:
            self._check_identity(lines[0])
            self.finished = [line for line in lines if "file" in line]
            kept = {str(entry["file"]) for entry in self.finished}
            self._work.truncate(nbytes)
            self._work.empty(kept)
        else:
            self._fresh = True
            self._work.empty(kept)
            self._work.drop_input()
            self._work.truncate(0)
            self._work.append(self._identity)
        self._work.make_content()
        self._work.append({"writes": sorted(self._writes)})
        sync_directory(self.partial)

    def _check_unfinished(self, lines: list[dict[str, Any]]) -> None:
        count = _count_files(lines)
        if count and not self._resume and not self._overwrite:
            raise OutputExistsError(
                f"{self.partial}: an unfinished run left {count} files here; add --resume to go on "
                "with it, or --overwrite to start again"
            )

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
        if not stat.S_ISREG(found.st_mode) or found.st_uid != self._work.uid:
            raise CheckpointError(f"{path}: was changed; start again with --overwrite")
        return path

    def finish_file(self, entry: Mapping[str, Any]) -> None:
        """Note in the journal that the file `entry["file"]` is complete and on disk."""
        self._work.append(entry)
        self.finished.append(dict(entry))

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
        found = {name for name, _ in self._work.files(CONTENT_NAME)}
        if found != set(names):
            odd = name_some(sorted(found ^ set(names)))
            raise CheckpointError(
                f"{self.folder}: {odd} was added or removed while the checkpoint was written; "
                "start again with --overwrite"
            )
        replaced = check_target(self.out, self._writes, overwrite=self._overwrite)
        _sync_tree(self.folder)
        sync_directory(self.partial)
        self._work.append({"publishing": sorted(replaced)})
        self._parents = []
        if replaced:
            self._work.take(self.out, REPLACED_NAME)
        try:
            self._work.give(CONTENT_NAME, self.out)
        except BaseException:
            if replaced:
                self._work.give(REPLACED_NAME, self.out)
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
        self._work.close()

    def _clean(self, replaced: object) -> None:
        """Remove `OUT.partial` after its content was published."""
        names = names_in(replaced)
        with self._work.below(REPLACED_NAME) as fd:
            left = remove_tree(fd, names.__contains__) if fd is not None else []
        if left:
            raise OutputExistsError(
                f"{self._work.at(REPLACED_NAME)}: holds {name_some(left)}, which Endor did not "
                "write; move that away, then remove the directory"
            )
        self._work.remove()

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
            # The journal knows: Ctrl-C may have come between its line and our list.
            if self._work.is_open and self._fresh and not _count_files(self._work.read()[0]):
                with contextlib.suppress(OSError, EndorError):
                    self._work.empty(set())
                    self._work.remove()
        finally:
            self._work.close()
        for folder in self._parents:
            with contextlib.suppress(OSError):
                folder.rmdir()


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


def _sync_tree(folder: Path) -> None:
    """Make everything below `folder` survive a power cut."""
    for path in [*folder.rglob("*"), folder]:
        flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW
        fd = os.open(path, flags)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def _count_files(lines: Collection[Mapping[str, Any]]) -> int:
    """Return how many finished files a journal names."""
    return sum("file" in line for line in lines)


def _brief(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
