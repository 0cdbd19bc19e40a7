"""Packed checkpoints, and folders of several, as one call each: unpack, verify, inspect.

`endor.packing` makes them.
"""

from contextlib import closing
from pathlib import Path

from endor.checkpoint import inspect, verify
from endor.checkpoint.composite import (
    inspect_composite,
    is_composite,
    unpack_composite,
    verify_composite,
)
from endor.checkpoint.dense import write_dense
from endor.checkpoint.inspect import Inspection
from endor.checkpoint.located import located
from endor.checkpoint.report import DenseReport, Progress
from endor.checkpoint.sources.packed import PackedSource
from endor.checkpoint.targets import output_path
from endor.checkpoint.verify import VerifyReport


def unpack_checkpoint(
    packed_dir: Path | str,
    out_dir: Path | str,
    *,
    revision: str | None = None,
    resume: bool = False,
    overwrite: bool = False,
    threads: int | None = None,
    progress: Progress | None = None,
) -> DenseReport:
    """Write a packed checkpoint as an ordinary one, bit for bit, in files like its source's.

    Every checksum is checked on the way. Arguments (`packed_dir` like `model`) and errors as for
    `endor.pack_checkpoint`.

    Raises:
        FormatError: the packed checkpoint is damaged.
    """
    packed_dir = located(packed_dir, revision=revision)
    if is_composite(packed_dir):
        return unpack_composite(
            Path(packed_dir),
            output_path(out_dir),
            unpack_checkpoint,
            resume=resume,
            overwrite=overwrite,
            threads=threads,
            progress=progress,
        )
    with closing(PackedSource(Path(packed_dir))) as source:
        return write_dense(
            source,
            output_path(out_dir),
            selected=frozenset(),
            pruner=None,
            description={},
            resume=resume,
            overwrite=overwrite,
            threads=threads,
            progress=progress,
        )


def verify_checkpoint(
    packed_dir: Path | str,
    *,
    revision: str | None = None,
    against: Path | str | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
) -> VerifyReport:
    """Return what is wrong with a packed checkpoint, or a folder of several.

    Arguments and errors as for `endor.checkpoint.verify.verify_checkpoint`.
    """
    packed_dir = located(packed_dir, revision=revision)
    against = None if against is None else located(against)
    if is_composite(packed_dir):
        return verify_composite(
            Path(packed_dir), against=against, threads=threads, progress=progress
        )
    return verify.verify_checkpoint(packed_dir, against=against, threads=threads, progress=progress)


def inspect_checkpoint(packed_dir: Path | str, *, revision: str | None = None) -> Inspection:
    """Return what a packed checkpoint, a packed file, or a folder of packed checkpoints holds.

    Errors as for `endor.checkpoint.inspect.inspect_checkpoint`.
    """
    packed_dir = located(packed_dir, revision=revision)
    if is_composite(packed_dir):
        return inspect_composite(Path(packed_dir))
    return inspect.inspect_checkpoint(packed_dir)
