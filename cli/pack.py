"""`endor pack`: a dense checkpoint to a packed one, pruned on the way if asked."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import click
from click.core import ParameterSource

from endor.cli.common import (
    MODEL,
    change,
    companion_lines,
    expanded_at_load,
    expanded_line,
    human,
    json_option,
    output_options,
    predictors_line,
    recoded_line,
    refuse_existing,
    resumable,
    selection_options,
)
from endor.cli.hub import at_hand, revision_option
from endor.cli.progress import calibration_progress, progress_bar
from endor.cli.pruning import (
    COUNTING,
    calibration_options,
    counts_neurons,
    dequantize_option,
    method_help,
    quantize_options,
    refuse_idle,
    requested,
)
from endor.cli.shares import finish_shares, pack_one_share, share_options
from endor.cli.terminal import emit, show
from endor.cli.types import Size
from endor.codecs import CodecChoice
from endor.pruning.contract import METHODS

if TYPE_CHECKING:
    from endor.checkpoint import PackReport


ASKED_BYTES = 1 << 30
"""From here on the seconds that it takes to import transformers and ask it about the result do not
count; of smaller ones `endor inspect --model` tells."""


@click.command("pack")
@click.argument("model", type=MODEL)
@click.argument("out", type=MODEL, required=False)
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
@dequantize_option
@click.option(
    "--neurons",
    is_flag=True,
    help="Where the activation is exactly zero for many neurons (ReLU, its square), store second "
    "matrices of feed-forward blocks by neuron, so that products skip those that are zero. With "
    "--calibration, also count how often each is active: the busiest then stay in memory.",
)
@click.option(
    "--predict",
    is_flag=True,
    help="With --neurons: make predictors of active neurons from the calibration text, for "
    "`endor generate --predict`, which is then lossy; without that nothing uses them.",
)
@click.option(
    "--recall",
    type=float,
    default=0.99,
    show_default=True,
    help="With --predict: the share of active neurons to be named.",
)
@click.option(
    "--bundle-neurons",
    is_flag=True,
    help="As --neurons, and all of a neuron lies together, for models that are read from a disk "
    "by a processor; where a device computes, these matrices are expanded at load.",
)
@selection_options
@click.option(
    "--max-shard-size",
    type=Size(),
    default="4GiB",
    show_default=True,
    help="Size that a file does not exceed.",
)
@click.option(
    "--stream",
    is_flag=True,
    help="Fetch a model from the Hub shard by shard while earlier ones are packed, and delete them "
    "behind: the disk needs room for OUT and a few shards. Without calibration only.",
)
@share_options
@output_options
@revision_option
@json_option
def pack_command(
    model: Path,
    out: Path | None,
    prune: str,
    codec: CodecChoice,
    dequantize: bool,
    neurons: bool,
    predict: bool,
    recall: float,
    bundle_neurons: bool,
    include: tuple[str, ...],
    exclude: tuple[str, ...],
    max_shard_size: int,
    stream: bool,
    shard: str | None,
    finish: bool,
    resume: bool,
    overwrite: bool,
    threads: int | None,
    revision: str | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Pack MODEL into OUT.

    With --bits, weights become entropy-coded integers times steps: 3.5 bits a weight cost little
    quality, 16 / 3.5 times fewer bytes than bfloat16.

    MODEL is a Hugging Face directory (safetensors or .bin, in one file or many; dense, already
    pruned, or compressed-tensors sparse-bitmask), a .safetensors file, a .gguf file, or a model on
    the Hub (org/name). Without --prune and --bits nothing is lost: `endor unpack` gives back every
    bit. Codes of a checkpoint that is quantised already (GPTQ, AWQ, fp8, int8, NF4, mxfp4, GGUF
    ...) are entropy-coded as they are; with --dequantize they become weights of a dense model,
    which runs, and are stored as codes and scales all the same.
    """
    if finish:
        _say(model, finish_shares(click.get_current_context(), model, out), as_json=as_json)
        return
    if out is None:
        raise click.UsageError("Missing argument 'OUT'.")
    quantizes = options["bits"] is not None or options["quality"] is not None
    context = click.get_current_context()
    count = counts_neurons(context, neurons or bundle_neurons)
    if prune == "none" and not quantizes:
        used = COUNTING if count or predict else frozenset[str]()
        refuse_idle(context, "--prune METHOD or --bits", used)
    if predict and not (neurons or bundle_neurons):
        raise click.UsageError("--predict goes with --neurons")
    if not predict and context.get_parameter_source("recall") is ParameterSource.COMMANDLINE:
        raise click.UsageError("--recall goes with --predict")
    if (neurons or bundle_neurons) and (quantizes or codec == "dense"):
        raise click.UsageError("--neurons takes codecs raw and exp: leave out one of the options")
    if codec != "auto" and (quantizes or dequantize):
        raise click.UsageError(
            "--bits, --quality and --dequantize take codec int: leave out --codec"
        )
    refuse_existing(out, resume=resume, overwrite=overwrite)
    from endor.packing import pack_checkpoint

    request = requested(prune, options)
    call = request | {
        "codec": codec,
        "dequantize": dequantize,
        "neurons": neurons,
        "count": count,
        "bundle_neurons": bundle_neurons,
        "predict": predict,
        "recall": recall,
        "include": include,
        "exclude": exclude,
        "max_shard_bytes": max_shard_size,
        "stream": stream,
        "resume": resume,
        "overwrite": overwrite,
        "threads": threads,
    }
    if shard is not None:
        pack_one_share(model, out, shard, as_json=as_json, revision=revision, **call)
        return
    if not stream:
        model, revision = at_hand(model, revision), None
    with resumable(out), calibration_progress() as layers, progress_bar("pack") as progress:
        report = pack_checkpoint(
            model,
            out,
            revision=revision,
            **call,
            progress=progress,
            layers=layers,
        )
    _say(out, report, as_json=as_json, predict=predict)


def _say(out: Path, report: "PackReport", *, as_json: bool, predict: bool = False) -> None:
    """Print what came out."""
    from endor.checkpoint import inspect_checkpoint

    made = inspect_checkpoint(out).predictors if predict and out.is_dir() else None
    looked = not report.stored_quantization and report.sizes.dense_bytes >= ASKED_BYTES
    expanded = expanded_at_load(out) if looked else None
    if as_json:
        names = None if expanded is None else expanded[0]
        predictors = made.to_dict() if made else None
        emit(report.to_dict() | {"expanded_at_load": names, "predictors": predictors})
        return
    sizes = report.sizes
    show(
        f"{out}: {human(sizes.dense_bytes)} -> {human(sizes.packed_bytes)}, "
        f"{change(sizes.ratio)}, {report.seconds:.1f} s, {report.gbps:.2f} GB/s"
    )
    if report.neurons_unused:
        more = "; there is nothing to predict, and the model stays exact" if predict else ""
        show(report.neurons_unused + more, err=True)
    elif sizes.neuron_tensors:
        show(f"{sizes.neuron_tensors} matrices stored by neuron")
    if made is not None:
        show(predictors_line(made))
    if report.streamed_shards:
        show(f"of the model at most {report.streamed_shards} shards were on disk at once", err=True)
    if report.stored_quantization:
        show(
            f"its weights are quantized ({report.stored_quantization}): packed for storage; "
            "unpack it to run it",
            err=True,
        )
    companion_lines(report.left_out, report.code)
    recoded_line(sizes, report.recodable_tensors)
    if report.recodable_tensors and not sizes.packed_tensors:
        return
    show(
        f"{sizes.packed_tensors} of {sizes.tensors} tensors packed: density {sizes.density:.4f}, "
        f"{sizes.bits_per_weight:.3f} bits a weight with all metadata and padding"
    )
    if expanded is not None:
        expanded_line(*expanded)
