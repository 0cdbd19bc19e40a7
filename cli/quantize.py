"""`endor quantize`: a dense checkpoint to a dense one whose weights are quantised."""

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
from endor.cli.pruning import (
    calibration_options,
    dequantize_option,
    quantize_options,
    requested,
)
from endor.cli.terminal import emit, show
from endor.pruning.contract import METHODS


@click.command("quantize")
@click.argument("model", type=MODEL)
@click.argument("out", type=MODEL)
@quantize_options
@click.option(
    "--prune",
    type=click.Choice(["none", *METHODS]),
    default="none",
    show_default=True,
    help="Zero weights first, and keep them zero.",
)
@calibration_options
@dequantize_option
@selection_options
@output_options
@revision_option
@json_option
def quantize_command(
    model: Path,
    out: Path,
    prune: str,
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
    """Quantise MODEL and write it to OUT as an ordinary dense Hugging Face checkpoint.

    OUT takes as much room as MODEL, and runs wherever MODEL does: it is for measuring what
    quantisation costs. `endor pack --bits` stores the same values in as few bits as asked for.
    """
    if options["bits"] is None and options["quality"] is None:
        raise click.UsageError("--bits or --quality is needed")
    refuse_existing(out, resume=resume, overwrite=overwrite)
    from endor.packing import prune_checkpoint

    request = requested(prune, options)
    model = at_hand(model, revision)
    with resumable(out), calibration_progress() as layers, progress_bar("quantize") as progress:
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
    bits = report.quantize["bits"]
    show(
        f"{out}: {report.weights:,} weights of {report.pruned_tensors} tensors take the values "
        f"that {bits:.2f} bits give them ({report.sparsity:.4f} zeros), {report.seconds:.1f} s"
    )
    show(
        f"{human(report.dense_bytes)} before and after; to make it smaller: "
        f"endor pack {model} PACKED --bits {bits}"
    )
    companion_lines(report.left_out, report.code)
