"""Models on the Hub as arguments of commands."""

import sys
from pathlib import Path

import click

from endor.cli.common import Command
from endor.cli.terminal import is_quiet


def revision_option(command: Command) -> Command:
    """Add `--revision`."""
    return click.option(
        "--revision",
        metavar="REV",
        help="Branch, tag or commit, of a model given by its id on the Hub (org/name, which may "
        "also be written org/name@REV).  [default: the main branch]",
    )(command)


def at_hand(model: Path, revision: str | None = None) -> Path:
    """Return where a model lies, which is fetched first if it is an id of the Hub.

    Errors as for `endor.checkpoint.located.located`.
    """
    from endor.hub.names import hub_name

    if hub_name(model, revision) is None:
        return model
    from endor.checkpoint.located import located

    return located(model, revision=revision, bars=sys.stderr.isatty() and not is_quiet())


def card_options(command: Command) -> Command:
    """Add `--base` and `--eval`."""
    for option in (
        click.option(
            "--eval",
            "evaluation",
            type=click.Path(exists=True, dir_okay=False, path_type=Path),
            metavar="FILE",
            help="What `endor eval PACKED --json` printed: its perplexity goes into the card.",
        ),
        click.option(
            "--base",
            metavar="ORG/NAME",
            help="The model that was packed.  [default: where it was packed from]",
        ),
    ):
        command = option(command)
    return command
