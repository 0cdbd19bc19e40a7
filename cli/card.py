"""`endor card`: the model card of a packed checkpoint, as `endor push` would upload it."""

from pathlib import Path

import click

from endor.cli.common import MODEL
from endor.cli.hub import card_options
from endor.cli.terminal import show


@click.command("card")
@click.argument("packed", type=MODEL)
@card_options
def card_command(packed: Path, base: str | None, evaluation: Path | None) -> None:
    """Print the model card of PACKED: what was done, sizes, how to load it, licence of the base."""
    from endor.sharing.card import CardFacts, model_card, read_evaluation

    facts = CardFacts(None, base, read_evaluation(evaluation) if evaluation else {})
    show(model_card(packed, facts).rstrip("\n"))
