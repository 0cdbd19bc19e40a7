"""`endor eval`: perplexity, and agreement with a dense model."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from endor.cli.common import MODEL, json_option

if TYPE_CHECKING:
    from collections.abc import Callable

    from endor.bench.perplexity import Perplexity


@click.command("eval")
@click.argument("model", type=MODEL)
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
    help="Also report how closely MODEL follows this one: KL divergence and equal first choices.",
)
@click.option("--ram", metavar="SIZE", help="Memory for packed weights, such as 2GiB.")
@json_option
def eval_command(
    model: Path,
    text: Path | None,
    window: int,
    stride: int | None,
    max_windows: int | None,
    against: Path | None,
    ram: str | None,
    as_json: bool,
) -> None:
    """Measure the perplexity of MODEL, a packed or dense checkpoint, on a text.

    Figures compare only between models with one tokenizer and the same window; bits per byte
    compare across tokenizers.
    """
    from transformers import AutoTokenizer

    from endor.bench.perplexity import agreement, perplexity, tokenize
    from endor.hf.load import open_model

    loaded = open_model(model, ram=ram)
    content = (text or shipped_text()).read_text(encoding="utf-8")
    tokens = tokenize(content, AutoTokenizer.from_pretrained(model))
    options: dict[str, Any] = {"window": window, "stride": stride, "max_windows": max_windows}
    if against is None:
        with window_bar() as progress:
            found = perplexity(loaded, tokens, **options, progress=progress)
        if as_json:
            click.echo(json.dumps({"model": str(model), **asdict(found)}))
            return
        click.echo(line(str(model), found))
        return
    reference = open_model(against, ram=ram)
    with window_bar() as progress:
        compared = agreement(loaded, reference, tokens, **options, progress=progress)
    if as_json:
        click.echo(json.dumps({"path": str(model), "against": str(against), **asdict(compared)}))
        return
    click.echo(line(str(model), compared.model))
    click.echo(line(str(against), compared.reference))
    click.echo(
        f"KL({against} || {model}) {compared.kl:.4f} nats a token, same first choice "
        f"{compared.top1:.1%}, difference {compared.nll_difference:+.4f} nats a token "
        f"(standard error {compared.nll_difference_stderr:.4f})"
    )


def shipped_text() -> Path:
    """Return the text that comes with the package."""
    from importlib.resources import files

    return Path(str(files("endor").joinpath("data/austen_persuasion.txt")))


def line(name: str, found: "Perplexity") -> str:
    """Return one model's figures for a reader."""
    per_byte = "" if found.bits_per_byte is None else f", {found.bits_per_byte:.4f} bits a byte"
    return (
        f"{name}: perplexity {found.perplexity:.4f} ({found.nll:.4f} nats a token, standard error "
        f"{found.nll_stderr:.4f}){per_byte}; {found.tokens} tokens in {found.windows} windows of "
        f"{found.window}, stride {found.stride}, {found.seconds:.1f} s"
    )


@contextmanager
def window_bar() -> "Iterator[Callable[[int, int], None]]":
    """Show a bar of windows on stderr; yields the function that moves it."""
    from tqdm import tqdm

    with tqdm(desc="eval", unit="window", dynamic_ncols=True, delay=0.2) as bar:

        def move(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield move
