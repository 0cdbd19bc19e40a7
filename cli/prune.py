"""`endor prune`: a dense checkpoint to a dense one with zeros in it, or to masks."""

import json
from pathlib import Path
from typing import Any

import click

from endor.cli.common import (
    MODEL,
    calibration_progress,
    human,
    json_option,
    output_options,
    progress_bar,
    selection_options,
)
from endor.cli.pruning import calibration_options, method_help, prepared
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
@selection_options
@output_options
@json_option
def prune_command(
    model: Path,
    out: Path,
    method: str,
    mask_only: bool,
    include: tuple[str, ...],
    exclude: tuple[str, ...],
    resume: bool,
    overwrite: bool,
    threads: int | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Prune MODEL and write it to OUT as an ordinary dense Hugging Face checkpoint.

    The zeros take as much room as before: `endor pack` is the step that makes the files smaller.
    """
    from endor.checkpoint import DenseReport, prune_checkpoint
    from endor.pruning.mask_writer import MaskReport, write_masks

    with (
        calibration_progress() as watch,
        prepared(model, method, options, include, exclude, watch) as found,
        progress_bar("prune") as progress,
    ):
        report: DenseReport | MaskReport
        if mask_only:
            report = write_masks(
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
        else:
            report = prune_checkpoint(
                found.source,
                out,
                prune=found.pruner,
                description=found.description,
                include=include,
                exclude=exclude,
                resume=resume,
                overwrite=overwrite,
                threads=threads,
                progress=progress,
            )
    if as_json:
        click.echo(json.dumps(report.to_dict()))
        return
    click.echo(
        f"{out}: {report.zeros:,} of {report.weights:,} weights of {report.pruned_tensors} tensors "
        f"are zero ({report.sparsity:.4f}), {report.seconds:.1f} s"
    )
    if isinstance(report, MaskReport):
        click.echo(f"{human(report.nbytes)} of masks, and no weights")
    else:
        click.echo(
            f"{human(report.dense_bytes)} before and after; to make it smaller: "
            f"endor pack {out} PACKED"
        )
