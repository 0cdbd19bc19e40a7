"""`endor prune`: a dense checkpoint to a dense one with zeros in it, or to masks."""

from pathlib import Path
from typing import Any

import click

from endor.cli.common import (
    MODEL,
    companion_lines,
    human,
    json_option,
    output_options,
    refuse_existing,
    resumable,
    selection_options,
)
from endor.cli.hub import at_hand, revision_option
from endor.cli.progress import calibration_progress, progress_bar
from endor.cli.pruning import calibration_options, dequantize_option, method_help, requested
from endor.cli.terminal import emit, show
from endor.pruning.contract import METHODS


@click.command("prune")
@click.argument("model", type=MODEL)
@click.argument("out", type=MODEL)
@click.option(
    "--method",
    type=click.Choice(list(METHODS)),
    default="auto",
    show_default=True,
    help=f"{method_help()}.",
)
@calibration_options
@click.option(
    "--mask-only",
    is_flag=True,
    help="Write which weights stay, one bit each, to the safetensors file OUT, and no weights.",
)
@dequantize_option
@selection_options
@output_options
@revision_option
@json_option
def prune_command(
    model: Path,
    out: Path,
    method: str,
    mask_only: bool,
    dequantize: bool,
    include: tuple[str, ...],
    exclude: tuple[str, ...],
    resume: bool,
    overwrite: bool,
    threads: int | None,
    revision: str | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Prune MODEL and write it to OUT as an ordinary dense Hugging Face checkpoint.

    The zeros take as much room as before: `endor pack` is the step that makes the files smaller.
    """
    refuse_existing(out, resume=resume, overwrite=overwrite)
    from endor.checkpoint import DenseReport
    from endor.packing import prune_checkpoint, prune_to_masks
    from endor.pruning.mask_writer import MaskReport

    request = requested(method, options)
    model = at_hand(model, revision)
    with resumable(out), calibration_progress() as layers, progress_bar("prune") as progress:
        report: DenseReport | MaskReport
        if mask_only:
            report = prune_to_masks(
                model,
                out,
                **request,
                dequantize=dequantize,
                include=include,
                exclude=exclude,
                overwrite=overwrite,
                threads=threads,
                progress=progress,
                layers=layers,
            )
        else:
            report = prune_checkpoint(
                model,
                out,
                **request,
                dequantize=dequantize,
                include=include,
                exclude=exclude,
                resume=resume,
                overwrite=overwrite,
                threads=threads,
                progress=progress,
                layers=layers,
            )
    if as_json:
        emit(report.to_dict())
        return
    show(
        f"{out}: {report.zeros:,} of {report.weights:,} weights of {report.pruned_tensors} tensors "
        f"are zero ({report.sparsity:.4f}), {report.seconds:.1f} s"
    )
    if isinstance(report, MaskReport):
        show(f"{human(report.nbytes)} of masks, and no weights")
    else:
        show(
            f"{human(report.dense_bytes)} before and after; to make it smaller: "
            f"endor pack {out} PACKED"
        )
        companion_lines(report.left_out, report.code)
