"""The pruning options that `endor pack` and `endor prune` share."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from endor.cli.common import Command, Share, Size
from endor.pruning.contract import METHODS, Method, Pattern, PruneOptions

if TYPE_CHECKING:
    from endor.checkpoint import CheckpointSource
    from endor.pruning.contract import WeightPruner


class PatternType(click.ParamType[str]):
    """`unstructured` or N:M."""

    name = "pattern"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        from endor.errors import ConfigError

        try:
            return str(Pattern.parse(str(value)))
        except ConfigError as error:
            self.fail(str(error), param, ctx)


class CalibrationText(click.ParamType[tuple[Path, ...]]):
    """A file, or the name of a shipped text."""

    name = "text"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[Path, ...]:
        from endor.errors import ConfigError
        from endor.pruning.calibration import shipped_texts

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
            callback=lambda _ctx, _param, texts: tuple(path for text in texts for path in text),
            help="Text or JSONL like what the model will see, or a shipped text: wiki, austen, "
            "python, web, or mix (the default) for all. May be repeated: texts take turns, window "
            "by window. It matters more than the method.",
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


def refuse_idle(ctx: click.Context, needed: str) -> None:
    """Raise where an option for pruning was given and nothing is pruned.

    Raises:
        UsageError: Such an option is on the command line.
    """
    idle = {field.name for field in fields(PruneOptions)} | {"scratch"}
    for option in ctx.command.params:
        given = ctx.get_parameter_source(option.name or "") is ParameterSource.COMMANDLINE
        if given and option.name in idle - {"method", "device"}:
            raise click.UsageError(f"{option.opts[0]} does nothing without {needed}", ctx)


def _count(name: str, default: int, help: str) -> Callable[[Command], Command]:
    """Return an option that takes a whole number from 1."""
    return click.option(name, type=click.IntRange(1), default=default, show_default=True, help=help)


@contextmanager
def pruned(
    model: Path,
    name: str,
    options: dict[str, Any],
    include: Sequence[str],
    exclude: Sequence[str],
    watch: Callable[[int, int, str], None],
    ready: Callable[["CheckpointSource"], None],
) -> Iterator[tuple["CheckpointSource", "WeightPruner | None", dict[str, Any]]]:
    """Yield what to convert: a source, a pruner for it (or None), and a description of both.

    A method that looks at weights only is a pruner on the plain source; a calibrated one is a
    source that computes layer after layer as its tensors are asked for.

    Args:
        model: The checkpoint.
        name: `"none"`, or a key of `METHODS`.
        options: Fields of `PruneOptions`.
        include: Patterns of tensors to prune besides the default ones.
        exclude: Patterns of tensors to leave alone.
        watch: Called with layers done, layers in total, and what goes on.
        ready: Called with the opened checkpoint, before the calibration begins.
    """
    from contextlib import closing
    from typing import cast

    from endor.checkpoint import open_source
    from endor.pruning.contract import WeightPruner

    with ExitStack() as stack:
        source = stack.enter_context(closing(open_source(model)))
        ready(source)
        if name == "none":
            yield source, None, {}
            return
        method: Method = METHODS[name]
        chosen = PruneOptions(method=name, **options)
        if not method.calibrated:
            yield source, cast(WeightPruner, method.create(chosen)), {}
            return
        from endor.checkpoint.select import select
        from endor.pruning.source import PrunedSource

        selected = select(source.tensors.values(), include=include, exclude=exclude)
        wrapped = stack.enter_context(
            closing(PrunedSource(source, chosen, selected, progress=watch))
        )
        yield wrapped, None, wrapped.describe()
