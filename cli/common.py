"""What several commands share: options, sizes in words."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from endor.cli.terminal import Interrupted, show
from endor.hf.config import DEFAULTS

if TYPE_CHECKING:
    from endor.checkpoint.predictors import Predictors
    from endor.checkpoint.report import Sizes

Command = TypeVar("Command", bound=Callable[..., Any])


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


_LOADING: dict[str, Callable[[Command], Command]] = {
    "vram": click.option("--vram", metavar="SIZE", help="Device memory, such as 6GiB."),
    "ram": click.option(
        "--ram",
        metavar="SIZE",
        help="Memory for weights, such as 2GiB; what does not fit is read from disk for every "
        "token.  [default: what the machine has]",
    ),
    "exact": click.option(
        "--exact/--fast",
        default=DEFAULTS["exact"],
        show_default=True,
        help="The dense model's bits, or products straight from the packed form.",
    ),
    "host_compute": click.option(
        "--host-compute",
        type=click.Choice(["auto", "on", "off"]),
        default=DEFAULTS["host_compute"],
        show_default=True,
        help="With --fast on a GPU: multiply weights that lie in RAM there; auto does so where it "
        "is predicted to be faster.",
    ),
    "experts": click.option(
        "--experts",
        type=click.Choice(["exact", "lossy"]),
        default=DEFAULTS["experts"],
        show_default=True,
        help="lossy: for up to 8 tokens, experts that are not at hand are replaced by others that "
        "are; the output is then not the model's own.",
    ),
    "predict": click.option(
        "--predict",
        is_flag=True,
        default=DEFAULTS["predict"],
        help="lossy, with --fast: for up to 8 tokens, multiply only what the checkpoint's "
        "predictors of active neurons name; the output is then not the model's own.",
    ),
    "kv": click.option(
        "--kv",
        type=click.Choice(["auto", "device", "ram", "disk"]),
        default=DEFAULTS["kv"],
        show_default=True,
        help="Where keys and values stay: where the model computes, in RAM beside a device, or on "
        "disk; auto takes the first that fits.",
    ),
    "context": click.option(
        "--context",
        type=click.IntRange(1),
        default=DEFAULTS["context"],
        show_default=True,
        help="Tokens the cache must hold, prompt included.",
    ),
    "prompt": click.option(
        "--prompt",
        type=click.IntRange(1),
        default=DEFAULTS["prompt"],
        show_default=True,
        help="Tokens of each prompt.",
    ),
    "batch": click.option(
        "--batch",
        type=click.IntRange(1),
        default=DEFAULTS["batch"],
        show_default=True,
        help="Sequences at once.",
    ),
}


def loading_options(*names: str) -> Callable[[Command], Command]:
    """Add options of `endor.hf.Loading`, and `--trust-remote-code`."""

    def add(command: Command) -> Command:
        for option in (trust_option, *(_LOADING[name] for name in reversed(names))):
            command = option(command)
        return command

    return add


def output_options(command: Command) -> Command:
    """Add `--resume`, `--overwrite` and `--threads`."""
    for option in (
        click.option(
            "--threads", type=click.IntRange(1, 256), help="Workers; every CPU when omitted."
        ),
        click.option("--overwrite", is_flag=True, help="Replace OUT if Endor wrote all of it."),
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
def resumable(out: Path) -> Iterator[None]:
    """Say after Ctrl-C whether a run that writes OUT left something to go on with."""
    try:
        yield
    except KeyboardInterrupt:
        kept = out.with_name(f"{out.name}.partial").is_dir() if out.name else False
        hint = "; the same command with --resume goes on" if kept else "; nothing was kept"
        raise Interrupted(f"interrupted{hint}") from None


def refuse_existing(out: Path, *, resume: bool, overwrite: bool) -> None:
    """Raise early, before anything is imported or opened, where OUT is there already.

    Raises:
        OutputExistsError: OUT is a file or a directory that is not empty.
    """
    from endor.errors import OutputExistsError

    if resume or overwrite or not os.path.lexists(out):
        return
    if not out.is_dir() or any(out.iterdir()):
        raise OutputExistsError(
            f"{out}: exists already; choose another OUT, or add --overwrite to replace it"
        )


def change(ratio: float) -> str:
    """Return a ratio of sizes, before over after, in words."""
    if not ratio:
        return "empty"
    return f"{ratio:.2f}x smaller" if ratio >= 1 else f"{1 / ratio:.2f}x larger"


def human(nbytes: float) -> str:
    """Return a size in words, in powers of 1000."""
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 1000:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.2f} {unit}"
        nbytes /= 1000
    return f"{nbytes:.2f} TB"


def companion_lines(left_out: Sequence[str], code: Sequence[str]) -> None:
    """Say on stderr what was not carried over, and what was that can run."""
    if left_out:
        show(
            f"left out (other weights, folders that no config names): {_shown(left_out)}", err=True
        )
    if code:
        show(
            f"carried over unread: Python code of the checkpoint ({_shown(code)}); it runs only "
            "where --trust-remote-code allows it",
            err=True,
        )


def expanded_at_load(packed: Path) -> tuple[list[str], int] | None:
    """Return what of a packed checkpoint its model needs dense, and how many bytes that takes.

    None where that cannot be said: without transformers, and of what it makes no model of.
    """
    from importlib.util import find_spec

    from endor.errors import EndorError

    if not packed.is_dir() or find_spec("transformers") is None:
        return None
    try:
        from endor.models.outline import outline

        found = outline(packed)
    except (EndorError, ImportError, OSError, MemoryError):
        return None
    return list(found.expanded), found.expanded_nbytes


def predictors_line(found: "Predictors") -> str:
    """Return what there is that guesses active neurons."""
    if not found.matrices:
        return "predictors: none; they would name so many neurons that all rows are as fast"
    return (
        f"predictors, lossy, used with --predict alone: {len(found.matrices)} blocks, "
        f"{human(found.nbytes)}; over {found.tokens:,} tokens they name {found.mean('rows'):.1%} "
        f"of the neurons and find {found.mean('recall'):.2%} of the active ones "
        f"({found.mean('active'):.1%})"
    )


def recoded_line(sizes: "Sizes", tried: int) -> None:
    """Say what became of packed codes of another format, `tried` tensors of them, if of any."""
    if not tried:
        return
    before, after = sizes.recoded_from_bytes, sizes.recoded_bytes
    said = f"{human(before)} -> {human(after)}, {change(before / after)}" if after else "no gain"
    kept = tried - sizes.recoded_tensors
    show(
        f"{sizes.recoded_tensors} of {tried} tensors of packed codes re-coded: {said}"
        + (f"; {kept} would gain nothing and stay as they are" if kept else "")
    )


def expanded_line(names: Sequence[str], nbytes: int) -> None:
    """Say on stderr what is packed in vain, if anything is."""
    if names:
        show(f"packed but expanded at load: {_shown(names)}, {human(nbytes)}", err=True)


def _shown(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


MODEL = click.Path(path_type=Path)
"""A path whose absence the library reports in one clear line."""
