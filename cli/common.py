"""What several commands share: options, progress bars, sizes in words."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import click

Command = TypeVar("Command", bound=Callable[..., Any])


class Size(click.ParamType[int]):
    """A number of bytes: `4GiB`, `500MB`, `1048576`."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        from endor.errors import ConfigError
        from endor.offload.placement import parse_bytes

        try:
            return parse_bytes(value)
        except ConfigError as error:
            self.fail(str(error), param, ctx)


def json_option(command: Command) -> Command:
    """Add `--json`, passed as `as_json`."""
    return click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")(command)


def trust_option(command: Command) -> Command:
    """Add `--trust-remote-code`."""
    return click.option(
        "--trust-remote-code",
        is_flag=True,
        help="Run Python code that comes with the checkpoint; without, it is refused, not asked.",
    )(command)


def kv_option(command: Command) -> Command:
    """Add `--kv`."""
    return click.option(
        "--kv",
        type=click.Choice(["auto", "device", "ram", "disk"]),
        default="auto",
        show_default=True,
        help="Where keys and values stay: where the model computes, in RAM beside a device, or on "
        "disk; auto takes the first that fits.",
    )(command)


def output_options(command: Command) -> Command:
    """Add `--resume`, `--overwrite` and `--threads`."""
    for option in (
        click.option(
            "--threads", type=click.IntRange(1, 256), help="Workers; every CPU when omitted."
        ),
        click.option("--overwrite", is_flag=True, help="Replace OUT when it exists."),
        click.option("--resume", is_flag=True, help="Go on with an interrupted run."),
    ):
        command = option(command)
    return command


def selection_options(command: Command) -> Command:
    """Add `--include` and `--exclude`."""
    for option in (
        click.option(
            "--exclude",
            multiple=True,
            metavar="PATTERN",
            help="Leave these tensors as they are; wins over --include. May be repeated.",
        ),
        click.option(
            "--include",
            multiple=True,
            metavar="PATTERN",
            help="Also take these tensors: a glob such as 'lm_head.weight', or re:EXPRESSION. "
            "By default the matrices of the layers are taken. May be repeated.",
        ),
    ):
        command = option(command)
    return command


@contextmanager
def progress_bar(what: str) -> Iterator[Callable[[int, int], None]]:
    """Show a bar of bytes done on stderr; yields the function that moves it."""
    from tqdm import tqdm

    with tqdm(desc=what, unit="B", unit_scale=True, dynamic_ncols=True, delay=0.2) as bar:

        def move(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield move


@contextmanager
def calibration_progress() -> Iterator[Callable[[int, int, str], None]]:
    """Show a second bar of layers done on stderr, once a calibrated run reports some."""
    from tqdm import tqdm

    bar: tqdm[Any] | None = None

    def move(done: int, total: int, what: str) -> None:
        nonlocal bar
        if bar is None:
            bar = tqdm(desc="layers", total=total, unit="layer", dynamic_ncols=True, position=1)
        bar.set_postfix_str(what)
        bar.update(done - bar.n)

    try:
        yield move
    finally:
        if bar is not None:
            bar.close()


def human(nbytes: float) -> str:
    """Return a size in words, in powers of 1000."""
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 1000:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.2f} {unit}"
        nbytes /= 1000
    return f"{nbytes:.2f} TB"


MODEL = click.Path(path_type=Path)
"""A path whose absence the library reports in one clear line."""
