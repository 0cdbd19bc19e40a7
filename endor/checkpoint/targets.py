"""Where an output may go: what would destroy its input, or what Endor did not write, is refused."""

import os
from pathlib import Path

from endor.checkpoint.manifest import Writes, replaceable
from endor.errors import CheckpointError, OutputExistsError


def output_path(out_dir: Path | str) -> Path:
    """Return the directory to make; `/` and `..` have no place beside them to work in."""
    out = Path(os.path.abspath(out_dir))  # noqa: PTH100 - resolve() would follow OUT's own link
    if not out.name:
        raise CheckpointError(f"{out}: is no place for a checkpoint; choose a directory below it")
    return Path(out_dir)


def target_of(out: Path) -> Path:
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


def _is_one_of(folder: Path, homes: list[Path]) -> bool:
    """Whether `folder` is one of `homes` by another name, as behind a bind mount."""
    try:
        found = folder.stat()
    except OSError:
        return False
    return any(home.exists() and os.path.samestat(found, home.stat()) for home in homes)
