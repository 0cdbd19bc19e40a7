"""`endor eval`: perplexity, and agreement with a dense model."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from endor.cli.common import MODEL, json_option, loading_options
from endor.cli.hub import at_hand, revision_option
from endor.cli.progress import progress_bar
from endor.cli.tables import table
from endor.cli.terminal import emit, show

if TYPE_CHECKING:
    from endor.bench.quality.evaluate import Evaluation, Precision


@click.command("eval")
@click.argument("models", type=MODEL, nargs=-1, required=True, metavar="MODEL...")
@click.option(
    "--text",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    metavar="FILE",
    help="UTF-8 text to score; a public-domain novel is shipped for those who have none.",
)
@click.option(
    "--window",
    type=click.IntRange(2),
    default=512,
    show_default=True,
    help="Tokens that the model sees at once.",
)
@click.option(
    "--stride",
    type=click.IntRange(1),
    help="Tokens between windows: the window itself (no overlap) when omitted, less for the "
    "recipe of the Hugging Face documentation.",
)
@click.option("--max-windows", type=click.IntRange(1), help="Stop after so many windows.")
@click.option(
    "--against",
    type=MODEL,
    metavar="DENSE",
    help="Also report how closely each MODEL follows this one: KL divergence, equal first choices.",
)
@click.option(
    "--bos/--no-bos",
    default=None,
    help="Start every window with the beginning-of-sequence token.  [default: as the tokenizer]",
)
@click.option(
    "--dtype",
    type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
    default="auto",
    show_default=True,
    help="Element type to compute in; auto is the checkpoint's own.",
)
@loading_options("ram")
@click.option(
    "--plot",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE.png",
    help="Draw perplexity against bits per weight (needs matplotlib).",
)
@revision_option
@json_option
def eval_command(
    models: tuple[Path, ...],
    text: Path | None,
    window: int,
    stride: int | None,
    max_windows: int | None,
    against: Path | None,
    bos: bool | None,
    dtype: "Precision",
    ram: str | None,
    plot: Path | None,
    trust_remote_code: bool,
    revision: str | None,
    as_json: bool,
) -> None:
    """Measure the perplexity of each MODEL, a packed or dense checkpoint, on a text.

    Figures compare only between models with one tokenizer and the same window; bits per byte
    compare across tokenizers. With --json, one object per model and line.
    """
    from endor.bench.quality.evaluate import evaluate, load, read_text, shipped_text

    here = [at_hand(model, revision) for model in models]
    dense = at_hand(against) if against else None
    content = read_text(text or shipped_text())
    reference = load(dense, dtype=dtype, trust_remote_code=trust_remote_code) if dense else None
    found = []
    for given, path in zip(models, here, strict=True):
        with progress_bar(given.name, unit="window") as progress:
            one = evaluate(
                path,
                content,
                reference=reference,
                window=window,
                stride=stride,
                max_windows=max_windows,
                bos=bos,
                ram=ram,
                dtype=dtype,
                trust_remote_code=trust_remote_code,
                progress=progress,
            )
        one = replace(one, model=given)  # not where the Hub's cache keeps it
        found.append(one)
        if as_json:
            emit(one.to_dict())
    if not as_json:
        show(report(found, (text or shipped_text()).name, against))
    if plot is not None:
        draw(found, plot)


def report(found: "list[Evaluation]", text: str, against: Path | None) -> str:
    """Return the table of all models, with its conditions above it."""
    first = found[0].perplexity
    how = "no overlap" if first.stride == first.window else f"stride {first.stride}"
    lines = [
        f"{text}: {first.tokens} tokens scored in {first.windows} windows of {first.window}, {how}"
        + (", each after the beginning-of-sequence token" if first.bos else ""),
        "",
    ]
    header = ["", "bits/weight", "perplexity", "nats/token", "+-", "bits/byte", "dtype", "s"]
    if against is not None:
        header += ["KL", "same first", "nats more", "+-"]
    rows = []
    for one in found:
        score = one.perplexity
        row = [
            one.model.name or str(one.model),
            _number(one.bits_per_weight, 2),
            _number(score.perplexity, 2),
            _number(score.nll, 4),
            _number(score.nll_stderr, 4),
            _number(score.bits_per_byte, 4),
            one.dtype,
            _number(score.seconds, 1),
        ]
        if one.agreement is not None:
            row += [
                _number(one.agreement.kl, 4),
                f"{one.agreement.top1:.1%}",
                f"{one.agreement.nll_difference:+.4f}",
                _number(one.agreement.nll_difference_stderr, 4),
            ]
        rows.append(row)
    lines.append(table(header, rows))
    if against is not None:
        reference = next(one.agreement for one in found if one.agreement is not None).reference
        lines += [
            "",
            f"KL, same first choice and nats more: against {against.name or against}, perplexity "
            f"{reference.perplexity:.2f}; the last +- is the standard error of the paired "
            "difference.",
        ]
    return "\n".join(lines)


def draw(found: "list[Evaluation]", path: Path) -> None:
    """Plot the models whose bits per weight are known."""
    from endor.bench.plot import Point, quality

    points = [
        Point(one.model.name, one.bits_per_weight, one.perplexity.perplexity)
        for one in found
        if one.bits_per_weight is not None
    ]
    first = found[0].perplexity
    quality(points, path, title=f"{first.tokens} tokens, windows of {first.window}")


def _number(value: float | None, digits: int) -> str:
    """Return a number for the table; a dash where it is unknown or undefined."""
    return "-" if value is None or value != value else f"{value:.{digits}f}"
