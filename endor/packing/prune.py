"""Pruning and quantising as one call each: a dense checkpoint out, or masks alone."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from endor.checkpoint.dense import dense_writes, write_dense
from endor.checkpoint.manifest import Writes
from endor.checkpoint.output import check_output
from endor.checkpoint.report import DenseReport, Progress
from endor.checkpoint.select import select
from endor.checkpoint.sources.contract import CheckpointSource
from endor.checkpoint.targets import output_path
from endor.packing.prepared import opened, prepared
from endor.pruning.contract import Progress as LayerProgress
from endor.pruning.run import Prune, is_calibrated, resolved
from endor.quantization.contract import QuantizeOptions

if TYPE_CHECKING:
    from endor.pruning.mask_writer import MaskReport


def prune_checkpoint(
    model: Path | str | CheckpointSource,
    out_dir: Path | str,
    *,
    revision: str | None = None,
    prune: Prune = "magnitude",
    sparsity: float = 0.5,
    pattern: str = "unstructured",
    quantize: QuantizeOptions | None = None,
    quality: float | None = None,
    calibrate: bool = True,
    description: Mapping[str, Any] | None = None,
    quantized: Mapping[str, Any] | None = None,
    dequantize: bool = False,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    resume: bool = False,
    overwrite: bool = False,
    threads: int | None = None,
    progress: Progress | None = None,
    layers: LayerProgress | None = None,
) -> DenseReport:
    """Write a checkpoint pruned, or quantised, and dense, in files laid out like the input's.

    Arguments and errors as for `pack_checkpoint`.
    """
    out, how = output_path(out_dir), resolved(prune, sparsity, pattern)

    def check(path: Path, writes: Writes | None = None) -> None:
        check_output(out, path, writes=writes, resume=resume, overwrite=overwrite)

    with opened(model, check, revision, dequantize=dequantize) as source:
        selected = select(source.tensors.values(), include=include, exclude=exclude)
        if quantize is not None or quality is not None or is_calibrated(how):
            check(source.path, dense_writes(source))
        with prepared(source, how, selected, quantize, quality, calibrate, layers) as found:
            codes = dict(quantized or found.quantized)
            about = dict(description or found.description)
            report = write_dense(
                found.source,
                out,
                selected=selected,
                pruner=found.pruner,
                description=about | ({"quantize": codes} if codes else {}),
                resume=resume,
                overwrite=overwrite,
                threads=threads,
                progress=progress,
            )
    return replace(report, quantize=codes)


def prune_to_masks(
    model: Path | str | CheckpointSource,
    out: Path | str,
    *,
    revision: str | None = None,
    prune: Prune = "magnitude",
    sparsity: float = 0.5,
    pattern: str = "unstructured",
    dequantize: bool = False,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    overwrite: bool = False,
    threads: int | None = None,
    progress: Progress | None = None,
    layers: LayerProgress | None = None,
) -> "MaskReport":
    """Write to the file `out` which weights a pruning keeps, one bit each, and no weights.

    Arguments and errors as for `pack_checkpoint`.
    """
    from endor.pruning.mask_writer import check_mask_target, write_masks

    out, how = Path(out), resolved(prune, sparsity, pattern)
    with opened(model, revision=revision, dequantize=dequantize) as source:
        check_mask_target(out, source.path, overwrite=overwrite)
        selected = select(source.tensors.values(), include=include, exclude=exclude)
        with prepared(source, how, selected, None, None, True, layers) as found:
            return write_masks(
                found.source,
                out,
                prune=found.pruner,
                description=found.description,
                include=include,
                exclude=exclude,
                overwrite=overwrite,
                threads=threads,
                progress=progress,
            )
