"""`endor pack`: a dense checkpoint to a packed one, pruned on the way if asked."""

import json
from pathlib import Path
from typing import Any, get_args

import click

from endor.cli.common import (
    MODEL,
    Size,
    calibration_progress,
    human,
    json_option,
    output_options,
    progress_bar,
    selection_options,
)
from endor.cli.pruning import calibration_options, method_help, prepared, quantize_options
from endor.codecs import CodecChoice
from endor.pruning.contract import METHODS


@click.command("pack")
@click.argument("model", type=MODEL)
@click.argument("out", type=MODEL)
@click.option(
    "--prune",
    type=click.Choice(["none", *METHODS]),
    default="none",
    show_default=True,
    help=f"Zero weights first. none keeps every bit; {method_help()}.",
)
@quantize_options
@calibration_options
@click.option(
    "--codec",
    type=click.Choice(get_args(CodecChoice)),
    default="auto",
    show_default=True,
    help="auto takes the smallest per tensor; raw is a bitmap and plain values, exp codes the "
    "exponents too.",
)
@selection_options
@click.option(
    "--max-shard-size",
    type=Size(),
    default="4GiB",
    show_default=True,
    help="Size that a file does not exceed.",
)
@output_options
@json_option
def pack_command(
    model: Path,
    out: Path,
    prune: str,
    codec: CodecChoice,
    include: tuple[str, ...],
    exclude: tuple[str, ...],
    max_shard_size: int,
    resume: bool,
    overwrite: bool,
    threads: int | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Pack MODEL into OUT.

    With --bits, weights become entropy-coded integers times steps: 3.5 bits a weight cost little
    quality, 16 / 3.5 times fewer bytes than bfloat16.

    MODEL is a Hugging Face directory (safetensors or .bin, in one file or many; dense, already
    pruned, or compressed-tensors sparse-bitmask) or a .safetensors file. Without --prune
    and --bits nothing is lost: `endor unpack` gives back every bit.
    """
    from endor.checkpoint import pack_checkpoint
    from endor.checkpoint.companions import source_quantization

    if codec != "auto" and (options["bits"] is not None or options["quality"] is not None):
        raise click.UsageError("--bits and --quality take codec int: leave out --codec")
    with (
        calibration_progress() as watch,
        prepared(model, prune, options, include, exclude, watch) as found,
        progress_bar("pack") as progress,
    ):
        report = pack_checkpoint(
            found.source,
            out,
            prune=found.pruner,
            description=found.description,
            quantized=found.quantized,
            codec=codec,
            include=include,
            exclude=exclude,
            max_shard_bytes=max_shard_size,
            resume=resume,
            overwrite=overwrite,
            threads=threads,
            progress=progress,
        )
    if as_json:
        click.echo(json.dumps(report.to_dict()))
        return
    sizes = report.sizes
    click.echo(
        f"{out}: {human(sizes.dense_bytes)} -> {human(sizes.packed_bytes)}, "
        f"{sizes.ratio:.2f}x smaller, {report.seconds:.1f} s, {report.gbps:.2f} GB/s"
    )
    config = report.path / "config.json"
    section = json.loads(config.read_text()).get("quantization_config") if config.exists() else {}
    method = source_quantization(section)
    if method is not None:
        click.echo(
            f"its weights are quantized ({method}): packed for storage; unpack it to run it",
            err=True,
        )
    click.echo(
        f"{sizes.packed_tensors} of {sizes.tensors} tensors packed: density {sizes.density:.4f}, "
        f"{sizes.bits_per_weight:.3f} bits a weight with all metadata and padding"
    )
