"""What `endor plan` plans for: the speed of one batch, or of as many sequences as pay."""

from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from endor.planning.search import Goal

goal_option = click.option(
    "--goal",
    type=click.Choice(["latency", "throughput"]),
    default="latency",
    show_default=True,
    help="latency: the fastest for --batch sequences; throughput: the batch that gives the most "
    "tokens a second in all, up to --batch if that is given.",
)


def most_sequences(goal: "Goal") -> int:
    """Return the largest batch that may be planned: what was asked for, if it was."""
    from endor.planning.search import MOST_SEQUENCES

    context = click.get_current_context()
    given = context.get_parameter_source("batch") is click.core.ParameterSource.COMMANDLINE
    return int(context.params["batch"]) if given and goal == "throughput" else MOST_SEQUENCES
