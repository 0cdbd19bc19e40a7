"""Folders of several models: a pipeline of diffusers, sentence-transformers of the old layout.

Such a folder has no config.json of its own but a list of parts (`model_index.json`,
`modules.json`). Each sub-folder with a model that has matrices to pack becomes a packed checkpoint,
by the rules for one; everything else is carried over as it is.

The output is built in `OUT.partial`, part by part, and appears by one rename. What a killed process
leaves goes on with `resume`; an error leaves nothing.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from endor.checkpoint.companions import Companions, copy_companions, files_below, follow
from endor.checkpoint.directory import (
    CONFIG_NAME,
    DIFFUSION_NAMES,
    PACKED_INDEX_NAME,
    STANDARD_NAMES,
)
from endor.checkpoint.inspect import Inspection, inspect_checkpoint
from endor.checkpoint.open import open_source
from endor.checkpoint.report import DenseReport, PackReport, Sizes
from endor.checkpoint.select import select
from endor.checkpoint.verify import VerifyReport, verify_checkpoint
from endor.errors import CheckpointError, ConfigError, OutputExistsError
from endor.jsontext import read_object
from endor.storage.temporary import sync_directory

LISTS = ("model_index.json", "modules.json")
MARK_NAME = ".endor-parts.json"
"""In `OUT.partial`: what it is being made from."""

PackOne = Callable[..., PackReport]
UnpackOne = Callable[..., DenseReport]
_COMPARED_BYTES = 1 << 20


def is_composite(path: Path | str) -> bool:
    """Whether `path` is a folder of several models, none of them its own."""
    folder = Path(path)
    return not (folder / CONFIG_NAME).exists() and any((folder / name).is_file() for name in LISTS)


def models_in(path: Path) -> list[str]:
    """Return the names of the sub-folders that hold a config and weights.

    Raises:
        CheckpointError: There is none, or one is a link, which may lead anywhere.
    """
    known = (PACKED_INDEX_NAME, *STANDARD_NAMES, *DIFFUSION_NAMES)
    found = [
        folder.name
        for folder in sorted(path.iterdir())
        if not folder.name.startswith(".")
        and (folder / CONFIG_NAME).is_file()
        and any((folder / name).exists() for name in known)
    ]
    for name in found:
        if (path / name).is_symlink():
            raise CheckpointError(
                f"{path / name}: is a link to a directory, and would be copied into the output; "
                "replace it by a copy if it belongs there, or remove it"
            )
    if not found:
        raise CheckpointError(
            f"{path}: none of its folders holds a model (config.json and weights); finish the "
            "download"
        )
    return found


def packed_in(path: Path) -> list[str]:
    """Return the names of the sub-folders that are packed checkpoints.

    Raises:
        CheckpointError: None is.
    """
    found = [name for name in models_in(path) if (path / name / PACKED_INDEX_NAME).exists()]
    if not found:
        raise CheckpointError(
            f"{path}: none of its models is packed; make a packed one with: endor pack MODEL OUT"
        )
    return found


def pack_composite(
    path: Path, out: Path, pack: PackOne, *, resume: bool, overwrite: bool, **options: Any
) -> PackReport:
    """Pack every model of `path` that has something to pack; errors as for `pack_checkpoint`.

    Args:
        path: The folder.
        out: The folder to make.
        pack: Packs one model.
        resume: Go on with what a killed run left.
        overwrite: Drop what a killed run left.
        options: For `pack`.
    """
    if options.get("include") or options.get("exclude"):
        raise ConfigError(
            f"{path}: holds several models, and include and exclude are about the tensors of one; "
            "pack that folder by itself"
        )
    names = []
    for name in models_in(path):
        with closing(open_source(path / name)) as source:  # what is wrong shows before work begins
            if select(source.tensors.values()):
                names.append(name)
    if not names:
        raise ConfigError(f"{path}: none of its models has a matrix of a layer to pack")
    identity = {"kind": "packed", "source": str(path.resolve()), "parts": names}
    identity |= {
        key: str(getattr(value, "method", value))
        for key, value in options.items()
        if key in ("prune", "codec")
    }
    reports: list[PackReport] = []
    with _staged(path, out, identity, resume=resume, overwrite=overwrite) as stage:
        for name in names:
            if (stage / name / PACKED_INDEX_NAME).exists():
                continue
            reports.append(pack(path / name, stage / name, resume=resume, **options))
        carried = _carry(path, stage, names)
    left_out = tuple(f"{each.path.name}/{item}" for each in reports for item in each.left_out)
    code = [f"{each.path.name}/{item}" for each in reports for item in each.code]
    return PackReport(
        path=out,
        sizes=_sum([inspect_checkpoint(out / name).sizes for name in names]),
        resumed_shards=sum(each.resumed_shards for each in reports),
        seconds=sum(each.seconds for each in reports),
        converted_bytes=sum(each.converted_bytes for each in reports),
        left_out=left_out,
        code=tuple(sorted([*code, *carried.code])),
        recodable_tensors=sum(each.recodable_tensors for each in reports),
    )


def unpack_composite(
    path: Path, out: Path, unpack: UnpackOne, *, resume: bool, overwrite: bool, **options: Any
) -> DenseReport:
    """Unpack every packed model of `path`; arguments and errors as for `pack_composite`."""
    names = packed_in(path)
    identity = {"kind": "dense", "source": str(path.resolve()), "parts": names}
    reports: list[DenseReport] = []
    with _staged(path, out, identity, resume=resume, overwrite=overwrite) as stage:
        for name in names:
            if not (stage / name).exists():
                reports.append(unpack(path / name, stage / name, resume=resume, **options))
        carried = _carry(path, stage, names)
    return DenseReport(
        path=out,
        tensors=sum(each.tensors for each in reports),
        pruned_tensors=0,
        weights=sum(each.weights for each in reports),
        zeros=sum(each.zeros for each in reports),
        dense_bytes=sum(each.dense_bytes for each in reports),
        files=sum(each.files for each in reports),
        resumed_files=sum(each.resumed_files for each in reports),
        seconds=sum(each.seconds for each in reports),
        left_out=tuple(f"{each.path.name}/{item}" for each in reports for item in each.left_out),
        code=carried.code,
    )


def verify_composite(path: Path, *, against: Path | None, **options: Any) -> VerifyReport:
    """Verify every packed model of `path`, and that what was carried over equals `against`."""
    names = packed_in(path)
    problems: list[str] = []
    for name in names:
        if against is not None and not (against / name).is_dir():
            raise CheckpointError(f"{against}: has no folder {name} to compare with")
    reports = [
        verify_checkpoint(
            path / name, against=None if against is None else against / name, **options
        )
        for name in names
    ]
    for name, report in zip(names, reports, strict=True):
        problems += [f"{name}: {problem}" for problem in report.problems]
    for name in _missing_parts(path):
        problems.append(f"{name}: is listed, and its folder is not here; copy it again")
    if against is not None:
        for name, file in _carried(path, names).files.items():
            other = against / name
            if not other.is_file() or not _same(file, other):
                problems.append(f"{name}: differs from {other}, or is not there")
    return VerifyReport(
        path=path,
        problems=tuple(problems),
        files=sum(each.files for each in reports),
        tensors=sum(each.tensors for each in reports),
        nbytes=sum(each.nbytes for each in reports),
        compared=sum(each.compared for each in reports),
        lossy=sum(each.lossy for each in reports),
    )


def inspect_composite(path: Path) -> Inspection:
    """Return what the packed models of `path` hold, each tensor under its model's name."""
    found = {name: inspect_checkpoint(path / name) for name in packed_in(path)}
    rows = [
        replace(row, name=f"{name}/{row.name}", file=f"{name}/{row.file}")
        for name, one in found.items()
        for row in one.rows
    ]
    return Inspection(path, tuple(rows), _sum([one.sizes for one in found.values()]))


def _sum(sizes: Sequence[Sizes]) -> Sizes:
    totals = {item.name: sum(getattr(each, item.name) for each in sizes) for item in fields(Sizes)}
    return Sizes(**totals)


def _missing_parts(path: Path) -> list[str]:
    """Return folders that `model_index.json` lists and that are not there."""
    if not (path / LISTS[0]).is_file():
        return []
    listed = read_object(path / LISTS[0], lenient=True)
    return [
        name
        for name, value in listed.items()
        if isinstance(value, list)
        and len(value) == 2
        and all(isinstance(item, str) for item in value)
        and not (path / name).is_dir()
    ]


def _carried(path: Path, names: Sequence[str]) -> Companions:
    """Return the files outside of the models that are converted."""
    found: dict[str, Path] = {}
    for item in sorted(path.iterdir()):
        if item.name.startswith(".") or item.name in names:
            continue
        if item.is_dir():
            found |= files_below(item, path)
        elif item.is_file():
            found[item.name] = follow(item, path)
    return Companions(found, ())


def _carry(path: Path, stage: Path, names: Sequence[str]) -> Companions:
    carried = _carried(path, names)
    for name in carried.files:
        (stage / name).unlink(missing_ok=True)  # of a run that was killed here
    copy_companions(carried, stage, None)
    return carried


def _same(left: Path, right: Path) -> bool:
    if left.stat().st_size != right.stat().st_size:
        return False
    with left.open("rb") as one, right.open("rb") as other:
        while piece := one.read(_COMPARED_BYTES):
            if piece != other.read(_COMPARED_BYTES):
                return False
    return True


@contextmanager
def _staged(
    path: Path, out: Path, identity: dict[str, Any], *, resume: bool, overwrite: bool
) -> Iterator[Path]:
    """Yield the folder that becomes `out` when all went well."""
    out = Path(os.path.abspath(out))  # noqa: PTH100 - resolve() would follow OUT's own link
    stage = out.with_name(f"{out.name}.partial")
    if out.resolve() == path.resolve() or path.resolve() in out.resolve().parents:
        raise CheckpointError(f"{out}: lies in {path}, which is read; choose another OUT")
    if os.path.lexists(out) and not (out.is_dir() and not out.is_symlink() and not _names(out)):
        raise OutputExistsError(
            f"{out}: exists already, and a folder of several models is not replaced; remove it, or "
            "choose another OUT"
        )
    if os.path.lexists(stage):
        _check_unfinished(stage, identity, resume=resume, overwrite=overwrite)
        if not resume:
            shutil.rmtree(stage)
    stage.mkdir(parents=True, exist_ok=True)
    (stage / MARK_NAME).write_text(json.dumps(identity), encoding="utf-8")
    try:
        yield stage
        (stage / MARK_NAME).unlink()
        sync_directory(stage)
        if out.is_dir():
            out.rmdir()
        stage.rename(out)
        sync_directory(out.parent)
    except Exception:
        shutil.rmtree(stage, ignore_errors=True)
        raise


def _check_unfinished(
    stage: Path, identity: dict[str, Any], *, resume: bool, overwrite: bool
) -> None:
    """Raise unless `stage` may be gone on with, or dropped."""
    mark = stage / MARK_NAME
    own = stage.is_dir() and not stage.is_symlink() and mark.is_file() and not mark.is_symlink()
    if not own or stage.stat().st_uid != os.geteuid():
        raise CheckpointError(f"{stage}: was not made by Endor for this; remove it by hand")
    if not resume and not overwrite:
        raise OutputExistsError(
            f"{stage}: an earlier run did not finish; --resume goes on, --overwrite drops it"
        )
    if resume and read_object(mark) != json.loads(json.dumps(identity)):
        raise CheckpointError(
            f"{stage}: was made from another source or with other options; add --overwrite to drop "
            "it"
        )


def _names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))  # noqa: PTH208 - names are all that is asked
