"""`endor pack`: a dense checkpoint to a packed one, pruned on the way if asked."""

import json
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import click

from endor.cli.common import (
    MODEL,
    Size,
    calibration_progress,
    change,
    companion_lines,
    expanded_at_load,
    expanded_line,
    human,
    json_option,
    output_options,
    progress_bar,
    refuse_existing,
    resumable,
    selection_options,
)
from endor.cli.pruning import (
    calibration_options,
    method_help,
    prepared,
    quantize_options,
    refuse_idle,
)
from endor.cli.terminal import echo, show
from endor.codecs import CodecChoice
from endor.errors import ConfigError
from endor.pruning.contract import METHODS

if TYPE_CHECKING:
    from endor.checkpoint import CheckpointSource, PackReport
    from endor.checkpoint.manifest import Writes


ASKED_BYTES = 1 << 30
"""From here on the seconds that it takes to import transformers and ask it about the result do not
count; of smaller ones `endor inspect --model` tells."""


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
    quantizes = options["bits"] is not None or options["quality"] is not None
    if prune == "none" and not quantizes:
        refuse_idle(click.get_current_context(), "--prune METHOD or --bits")
    if codec != "auto" and quantizes:
        raise click.UsageError("--bits and --quality take codec int: leave out --codec")
    refuse_existing(out, resume=resume, overwrite=overwrite)
    from endor.checkpoint.output import check_output

    def check(source: Path, writes: "Writes | None" = None) -> None:
        # A file that becomes a file is looked at when it is packed.
        if not (source.is_file() and out.suffix == ".safetensors"):
            check_output(out, source, writes=writes, resume=resume, overwrite=overwrite)

    from endor.checkpoint import pack_checkpoint
    from endor.checkpoint.composite import is_composite

    write = partial(
        pack_checkpoint,
        codec=codec,
        include=include,
        exclude=exclude,
        max_shard_bytes=max_shard_size,
        resume=resume,
        overwrite=overwrite,
        threads=threads,
    )
    if is_composite(model):
        needs = METHODS.get(prune)
        if quantizes or (needs is not None and needs.calibrated):
            raise ConfigError(
                f"{model}: holds several models, which are packed lossless or with --prune "
                "magnitude; for more, pack the folder of one"
            )
        with resumable(out), progress_bar("pack") as progress:
            report = write(
                model,
                out,
                prune=prune,
                sparsity=options["sparsity"],
                pattern=options["pattern"],
                progress=progress,
            )
        _say(out, report, None, as_json=as_json)
        return
    check(model)
    from endor.checkpoint.companions import QUANTIZATION_KEY
    from endor.checkpoint.convert import pack_writes

    def ready(source: "CheckpointSource") -> None:
        check(source.path, pack_writes(source))

    with (
        resumable(out),
        calibration_progress() as watch,
        prepared(model, prune, options, include, exclude, watch, ready) as found,
        progress_bar("pack") as progress,
    ):
        quantized = (found.source.config() or {}).get(QUANTIZATION_KEY)
        report = write(
            found.source,
            out,
            prune=found.pruner,
            description=found.description,
            quantized=found.quantized,
            progress=progress,
        )
    _say(out, report, quantized, as_json=as_json)


def _say(out: Path, report: "PackReport", quantized: Any, *, as_json: bool) -> None:
    """Print what came out."""
    from endor.checkpoint.companions import quantization_name

    looked = quantized is None and report.sizes.dense_bytes >= ASKED_BYTES
    expanded = expanded_at_load(out) if looked else None
    if as_json:
        names = None if expanded is None else expanded[0]
        echo(json.dumps(report.to_dict() | {"expanded_at_load": names}))
        return
    sizes = report.sizes
    show(
        f"{out}: {human(sizes.dense_bytes)} -> {human(sizes.packed_bytes)}, "
        f"{change(sizes.ratio)}, {report.seconds:.1f} s, {report.gbps:.2f} GB/s"
    )
    if quantized is not None:
        show(
            f"its weights are quantized ({quantization_name(quantized)}): packed for storage; "
            "unpack it to run it",
            err=True,
        )
    companion_lines(report.left_out, report.code)
    show(
        f"{sizes.packed_tensors} of {sizes.tensors} tensors packed: density {sizes.density:.4f}, "
        f"{sizes.bits_per_weight:.3f} bits a weight with all metadata and padding"
    )
    if expanded is not None:
        expanded_line(*expanded)
