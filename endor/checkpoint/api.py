"""Packing as one call: what to select, how to prune, where to write."""

import os
from collections.abc import Mapping, Sequence
from contextlib import closing, nullcontext
from pathlib import Path
from typing import Any, cast

from endor.checkpoint import inspect, verify
from endor.checkpoint.companions import QUANTIZATION_KEY, quantization_name
from endor.checkpoint.composite import (
    inspect_composite,
    is_composite,
    pack_composite,
    unpack_composite,
    verify_composite,
)
from endor.checkpoint.convert import DEFAULT_SHARD_BYTES, PackOptions, convert
from endor.checkpoint.dense import write_dense
from endor.checkpoint.inspect import Inspection
from endor.checkpoint.open import open_source
from endor.checkpoint.report import DenseReport, PackReport, Progress
from endor.checkpoint.select import select
from endor.checkpoint.single import pack_file
from endor.checkpoint.sources.contract import CheckpointSource
from endor.checkpoint.verify import VerifyReport
from endor.codecs import CodecChoice
from endor.errors import CheckpointError, ConfigError, PruningError
from endor.pruning.contract import METHODS, PruneOptions, WeightPruner

MIN_SHARD_BYTES = 1 << 20


def pack_checkpoint(
    model: Path | str | CheckpointSource,
    out_dir: Path | str,
    *,
    prune: str | WeightPruner | None = None,
    sparsity: float = 0.5,
    pattern: str = "unstructured",
    description: Mapping[str, Any] | None = None,
    quantized: Mapping[str, Any] | None = None,
    codec: CodecChoice = "auto",
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    resume: bool = False,
    overwrite: bool = False,
    threads: int | None = None,
    progress: Progress | None = None,
) -> PackReport:
    """Write a checkpoint in packed form and return what came out.

    Tensors are read, pruned, encoded and written one by one: memory stays below three times the
    largest tensor and 300 MB. `out_dir` appears when all is done; until then everything lies in
    `out_dir.partial`, from where `resume` goes on.

    Args:
        model: A Hugging Face directory, a folder of several models (a diffusers pipeline, of which
            each is packed by itself), a .safetensors file, a packed directory, or a source that
            yields (already pruned) tensors.
        out_dir: The directory to make; or the file, where `model` is a lone file and this ends in
            `.safetensors`.
        prune: None or "none" keeps every bit; "magnitude"; or an object with a `prune` method.
        sparsity: Share of zeros in every pruned matrix.
        pattern: "unstructured", or "N:M" for N survivors in every M.
        description: What config.json says about the pruning, where `model` yields pruned tensors.
        quantized: What it says about the quantisation, where `model` yields quantised ones.
        codec: For the packed tensors: "auto", "raw", "exp" or "dense".
        include: Patterns (globs, or `re:` and a regular expression) of tensors to pack besides the
            matrices of the layers.
        exclude: Patterns of tensors to leave as they are.
        max_shard_bytes: Size that a file does not exceed, unless one record does.
        resume: Go on with an interrupted run.
        overwrite: Replace `out_dir`.
        threads: Workers; every CPU when omitted.
        progress: Called with dense bytes done and in total.

    Raises:
        CheckpointError: the input is incomplete, or the output cannot be made.
        OutputExistsError: there is an output, and neither `resume` nor `overwrite`.
        ConfigError: an option makes no sense, or a pattern matches nothing.
        PruningError, DTypeError: a selected tensor cannot be pruned.
        OSError: from the file system.
    """
    if max_shard_bytes < MIN_SHARD_BYTES:
        raise ConfigError(
            f"max_shard_bytes: must be at least {MIN_SHARD_BYTES}, got {max_shard_bytes}"
        )
    out = _target(out_dir)
    if isinstance(model, (str, Path)) and is_composite(model):
        return pack_composite(
            Path(model),
            out,
            pack_checkpoint,
            prune=prune,
            sparsity=sparsity,
            pattern=pattern,
            codec=codec,
            include=include,
            exclude=exclude,
            max_shard_bytes=max_shard_bytes,
            resume=resume,
            overwrite=overwrite,
            threads=threads,
            progress=progress,
        )
    pruner, found = _pruner(prune, sparsity, pattern)
    with _opened(model) as source:
        selected = select(source.tensors.values(), include=include, exclude=exclude)
        _check_selection(source, selected, pruner)
        if source.directory is None and out.suffix == ".safetensors":
            if resume:
                raise ConfigError(f"{out}: a single file is packed in one go; drop --resume")
            return pack_file(
                source,
                out,
                selected=selected,
                pruner=pruner,
                codec=codec,
                overwrite=overwrite,
                threads=threads,
                progress=progress,
            )
        return convert(
            source,
            out,
            selected=selected,
            pruner=pruner,
            options=PackOptions(codec, max_shard_bytes, description or found, quantized or {}),
            resume=resume,
            overwrite=overwrite,
            threads=threads,
            progress=progress,
        )


def prune_checkpoint(
    model: Path | str | CheckpointSource,
    out_dir: Path | str,
    *,
    prune: str | WeightPruner | None = "magnitude",
    sparsity: float = 0.5,
    pattern: str = "unstructured",
    description: Mapping[str, Any] | None = None,
    quantized: Mapping[str, Any] | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    resume: bool = False,
    overwrite: bool = False,
    threads: int | None = None,
    progress: Progress | None = None,
) -> DenseReport:
    """Write a checkpoint pruned and dense, in files laid out like the input's.

    Arguments and errors as for `pack_checkpoint`.
    """
    pruner, found = _pruner(prune, sparsity, pattern)
    with _opened(model) as source:
        selected = select(source.tensors.values(), include=include, exclude=exclude)
        _check_selection(source, selected, pruner)
        return write_dense(
            source,
            _target(out_dir),
            selected=selected,
            pruner=pruner,
            description=dict(description or found) | _said("quantize", quantized),
            resume=resume,
            overwrite=overwrite,
            threads=threads,
            progress=progress,
        )


def unpack_checkpoint(
    packed_dir: Path | str,
    out_dir: Path | str,
    *,
    resume: bool = False,
    overwrite: bool = False,
    threads: int | None = None,
    progress: Progress | None = None,
) -> DenseReport:
    """Write a packed checkpoint as an ordinary one, bit for bit, in files like its source's.

    Every checksum is checked on the way. Arguments and errors as for `pack_checkpoint`.

    Raises:
        FormatError: the packed checkpoint is damaged.
    """
    from endor.checkpoint.sources.packed import PackedSource

    if is_composite(packed_dir):
        return unpack_composite(
            Path(packed_dir),
            _target(out_dir),
            unpack_checkpoint,
            resume=resume,
            overwrite=overwrite,
            threads=threads,
            progress=progress,
        )
    with closing(PackedSource(Path(packed_dir))) as source:
        return write_dense(
            source,
            _target(out_dir),
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
    against: Path | str | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
) -> VerifyReport:
    """Return what is wrong with a packed checkpoint, or a folder of several.

    Arguments and errors as for `endor.checkpoint.verify.verify_checkpoint`.
    """
    if is_composite(packed_dir):
        reference = None if against is None else Path(against)
        return verify_composite(
            Path(packed_dir), against=reference, threads=threads, progress=progress
        )
    return verify.verify_checkpoint(packed_dir, against=against, threads=threads, progress=progress)


def inspect_checkpoint(packed_dir: Path | str) -> Inspection:
    """Return what a packed checkpoint, a packed file, or a folder of packed checkpoints holds.

    Errors as for `endor.checkpoint.inspect.inspect_checkpoint`.
    """
    if is_composite(packed_dir):
        return inspect_composite(Path(packed_dir))
    return inspect.inspect_checkpoint(packed_dir)


def _said(key: str, about: Mapping[str, Any] | None) -> dict[str, Any]:
    return {key: dict(about)} if about else {}


def _target(out_dir: Path | str) -> Path:
    """Return the directory to make; `/` and `..` have no place beside them to work in."""
    out = Path(os.path.abspath(out_dir))  # noqa: PTH100 - resolve() would follow OUT's own link
    if not out.name:
        raise CheckpointError(f"{out}: is no place for a checkpoint; choose a directory below it")
    return Path(out_dir)


def _opened(
    model: Path | str | CheckpointSource,
) -> "closing[CheckpointSource] | nullcontext[CheckpointSource]":
    """Return a context that closes the source iff it was opened here."""
    if isinstance(model, (str, Path)):
        return closing(open_source(model))
    return nullcontext(model)


def _pruner(
    prune: str | WeightPruner | None, sparsity: float, pattern: str
) -> tuple[WeightPruner | None, dict[str, Any]]:
    """Return the pruner, and how config.json describes what it does."""
    if prune is None or prune == "none":
        return None, {}
    if not isinstance(prune, str):
        describe = getattr(prune, "describe", None)
        return prune, describe() if describe else {"method": type(prune).__name__.lower()}
    method = METHODS.get(prune)
    if method is None:
        raise ConfigError(f"prune: must be none or one of {', '.join(METHODS)}, got {prune!r}")
    if method.calibrated:
        raise ConfigError(
            f"prune: {prune!r} needs calibration text; use the endor command, or give a source "
            "that yields pruned tensors"
        )
    options = PruneOptions(method=prune, sparsity=sparsity, pattern=pattern)
    pruner = cast(WeightPruner, method.create(options))
    return _pruner(pruner, sparsity, pattern)


def _check_selection(
    source: CheckpointSource, selected: frozenset[str], pruner: WeightPruner | None
) -> None:
    if pruner is not None and not selected:
        raise ConfigError(
            f"{source.path}: nothing to prune: none of {len(source.tensors)} tensors is a matrix "
            "of a layer; name some with include"
        )
    quantized = (source.config() or {}).get(QUANTIZATION_KEY)
    if pruner is not None and quantized:
        raise PruningError(
            f"{source.path}: config.json says that its weights are quantized "
            f"({quantization_name(quantized)}): their sizes mean nothing without their scales; "
            "prune the checkpoint it was made from"
        )
