"""The options that `endor pack`, `endor prune` and `endor quantize` share."""

from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from endor.cli.common import Command, trust_option
from endor.cli.types import Share, Size
from endor.codecs.rounding import LEAST_BITS, MOST_BITS
from endor.pruning.contract import METHODS, NOTHING, Pattern, PruneOptions
from endor.quantization.contract import QuantizeOptions


class PatternType(click.ParamType[str]):
    """`unstructured` or N:M."""

    name = "pattern"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        from endor.errors import ConfigError

        try:
            return str(Pattern.parse(str(value)))
        except ConfigError as error:
            self.fail(str(error), param, ctx)


NO_TEXT = "none"
"""What `--calibration` says when there shall be none."""


class CalibrationText(click.ParamType[tuple[Path, ...] | None]):
    """A file, or the name of a shipped text; None for no text."""

    name = "text"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[Path, ...] | None:
        from endor.errors import ConfigError
        from endor.pruning.calibration import shipped_texts

        if value == NO_TEXT:
            return None
        try:
            return shipped_texts(str(value))
        except ConfigError as error:
            if Path(value).is_file():
                return (Path(value),)
            self.fail(str(error), param, ctx)


def method_help() -> str:
    """Return one line on each method."""
    return "; ".join(f"{method.name}: {method.help}" for method in METHODS.values())


def calibration_options(command: Command) -> Command:
    """Add what the calibrated methods take, passed on as a dict by `pruning_options`."""
    defaults = PruneOptions()
    for option in (
        trust_option,
        click.option(
            "--device",
            default=defaults.device,
            show_default=True,
            help="Where calibrated pruning computes: auto, cpu, cuda, cuda:0, ...",
        ),
        click.option(
            "--scratch",
            type=click.Path(file_okay=False, path_type=Path),
            help="Folder for activations that do not fit in memory.",
        ),
        click.option(
            "--memory",
            "memory_bytes",
            type=Size(),
            default="4GiB",
            show_default=True,
            help="Most memory for activations; the rest goes to --scratch.",
        ),
        click.option(
            "--layer-sparsity",
            default=defaults.layer_sparsity,
            show_default=True,
            metavar="RULE",
            help="uniform, linear[:SPREAD], owl[:SPREAD], or a JSON file {layer: sparsity}.",
        ),
        click.option(
            "--sequential/--no-sequential",
            default=defaults.sequential,
            show_default=True,
            help="Show each matrix of a layer what the pruned ones before it yield; without, a "
            "layer takes fewer passes.",
        ),
        click.option(
            "--dampening",
            default=defaults.dampening,
            show_default=True,
            help="Ridge on the Gram matrix, as a share of its mean diagonal.",
        ),
        click.option("--seed", default=defaults.seed, show_default=True, help="Of the windows."),
        _count("--seq-len", defaults.seq_len, "Tokens of a calibration window."),
        _count("--samples", defaults.samples, "Calibration windows."),
        _count(
            "--passes",
            defaults.passes,
            "How often auto goes over the windows while it re-trains a layer.",
        ),
        click.option(
            "--chat-template",
            is_flag=True,
            help="Render JSONL conversations with the tokenizer's chat template.",
        ),
        click.option(
            "--calibration",
            type=CalibrationText(),
            multiple=True,
            metavar="FILE",
            callback=_texts,
            help="Text or JSONL like what the model will see, or a shipped text: wiki, austen, "
            "python, web, or mix (the default) for all. May be repeated: texts take turns, window "
            "by window. It matters more than the method. none: quantise without any.",
        ),
        click.option(
            "--pattern",
            type=PatternType(),
            default="unstructured",
            show_default=True,
            help="unstructured, or N:M for N survivors in every M (2:4, 4:8).",
        ),
        click.option(
            "--sparsity",
            type=Share(),
            default=defaults.sparsity,
            show_default=True,
            help="Share of zeros in every pruned matrix.",
        ),
    ):
        command = option(command)
    return command


def quantize_options(command: Command) -> Command:
    """Add the options of quantisation."""
    for option in (
        click.option(
            "--keep-zeros/--no-keep-zeros",
            default=None,
            help="Whether weights that are zero stay so.  [default: in matrices of which a tenth "
            "is zero]",
        ),
        click.option(
            "--quality",
            type=click.FloatRange(0, min_open=True),
            metavar="KL",
            help="Quantise: find the fewest bits at which predictions on calibration windows held "
            "out diverge from the dense model's by at most KL nats a token. Takes a few runs.",
        ),
        click.option(
            "--bits",
            type=click.FloatRange(LEAST_BITS, MOST_BITS),
            metavar="BITS",
            help="Quantise: bits that a weight takes on average, all metadata counted "
            f"({LEAST_BITS} to {MOST_BITS}, fractions too; 3.5 is a good start).",
        ),
    ):
        command = option(command)
    return command


dequantize_option = click.option(
    "--dequantize",
    is_flag=True,
    help="Read a checkpoint that is quantised already (fp8, GPTQ, AWQ, int8, NF4, mxfp4 ...) as "
    "the dense one that it stands for.",
)


def _texts(
    ctx: click.Context, param: click.Parameter, texts: Sequence[tuple[Path, ...] | None]
) -> tuple[Path, ...] | None:
    """Return all paths; None for no calibration."""
    paths = tuple(path for text in texts for path in text or ())
    if None not in texts:
        return paths
    if paths:
        raise click.BadParameter("'none' does not go with a text", ctx, param)
    return None


def refuse_idle(ctx: click.Context, needed: str, used: frozenset[str] = frozenset()) -> None:
    """Raise where an option for pruning was given and nothing is pruned.

    Args:
        ctx: Of the command.
        needed: The option that is missing.
        used: Options that something else than pruning needs.

    Raises:
        UsageError: Such an option is on the command line.
    """
    idle = {field.name for field in fields(PruneOptions)} | {"scratch"}
    for option in ctx.command.params:
        given = ctx.get_parameter_source(option.name or "") is ParameterSource.COMMANDLINE
        if given and option.name in idle - {"method", "device", "trust_remote_code"} - used:
            raise click.UsageError(f"{option.opts[0]} does nothing without {needed}", ctx)


COUNTING = frozenset(
    {"calibration", "samples", "seq_len", "seed", "chat_template", "memory_bytes", "scratch"}
)
"""What a calibration is told that changes nothing."""


def counts_neurons(ctx: click.Context, neurons: bool) -> bool:
    """Whether neurons are to be counted: a calibration text was named."""
    given = ctx.get_parameter_source("calibration") is ParameterSource.COMMANDLINE
    return neurons and given and ctx.params["calibration"] is not None


def _count(name: str, default: int, help: str) -> Callable[[Command], Command]:
    """Return an option that takes a whole number from 1."""
    return click.option(name, type=click.IntRange(1), default=default, show_default=True, help=help)


def requested(name: str, options: dict[str, Any]) -> dict[str, Any]:
    """Return what the options of the command line mean to the calls of `endor.packing`.

    Args:
        name: `"none"`, or a key of `METHODS`.
        options: Fields of `PruneOptions` and, if the command takes such, `QuantizeOptions`.

    Raises:
        UsageError: The options contradict each other.
        ConfigError: One of them makes no sense.
    """
    options = dict(options)
    bits, quality, keep_zeros = (
        options.pop(key, None) for key in ("bits", "quality", "keep_zeros")
    )
    text = options.pop("calibration")
    prune = PruneOptions(method=name, calibration=text or (), **options)
    if text is None and METHODS.get(name, NOTHING).calibrated:
        raise click.UsageError(
            f"{name} needs a calibration text; magnitude is the one that does not"
        )
    if bits is not None and quality is not None:
        raise click.UsageError("--bits and --quality exclude each other")
    if text is None and bits is None:
        raise click.UsageError("'--calibration none' goes with --bits")
    if bits is None and quality is None:
        return {"prune": prune}
    quantize = QuantizeOptions(
        bits=bits or QuantizeOptions().bits, dampening=prune.dampening, keep_zeros=keep_zeros
    )
    return {
        "prune": prune,
        "quantize": quantize,
        "quality": quality,
        "calibrate": text is not None,
    }
