"""`endor push`: a packed checkpoint to the Hub, with a card."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from endor.cli.common import MODEL, human, json_option
from endor.cli.hub import card_options
from endor.cli.terminal import emit, is_quiet, show

if TYPE_CHECKING:
    from endor.sharing.push import Card


@click.command("push")
@click.argument("packed", type=MODEL)
@click.argument("repo", metavar="ORG/NAME")
@click.option(
    "--private/--public",
    default=None,
    help="For a repository that is made.  [default: as the account says]",
)
@click.option("--revision", metavar="BRANCH", help="A branch, made if it is not there.")
@click.option("--create-pr", is_flag=True, help="Propose the commit as a pull request.")
@click.option("--yes", is_flag=True, help="Also into a repository that holds other files.")
@click.option(
    "--card",
    type=click.Choice(["auto", "new", "keep"]),
    default="auto",
    show_default=True,
    help="auto makes a model card unless somebody wrote a README.md, in PACKED or on the Hub; new "
    "makes one in any case, keep never.",
)
@card_options
@click.option("--dry-run", is_flag=True, help="Say what would be uploaded; upload nothing.")
@json_option
def push_command(
    packed: Path,
    repo: str,
    private: bool | None,
    revision: str | None,
    create_pr: bool,
    yes: bool,
    card: "Card",
    base: str | None,
    evaluation: Path | None,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Upload PACKED to the Hub as ORG/NAME, in one commit, with a model card.

    What was published with PACKED goes up and nothing else. HF_TOKEN, or `hf auth login`, says who
    you are.
    """
    from endor.sharing.card import CardFacts, read_evaluation
    from endor.sharing.push import push_checkpoint

    facts = CardFacts(repo, base, read_evaluation(evaluation) if evaluation else {})
    found = push_checkpoint(
        packed,
        repo,
        private=private,
        revision=revision,
        create_pr=create_pr,
        over_others=yes,
        card=card,
        facts=facts,
        dry_run=dry_run,
        bars=sys.stderr.isatty() and not is_quiet(),
    )
    nbytes = sum((packed / file).stat().st_size for file in found.files)
    if as_json:
        emit(
            {
                "repo": found.repo,
                "files": list(found.files),
                "removed": list(found.removed),
                "bytes": nbytes,
                "card": found.card,
                "url": found.url,
            }
        )
        return
    what = "a new card" if found.card is not None else "README.md as somebody wrote it"
    where = f"{repo} would get" if dry_run else f"{found.url}: got"
    show(f"{where} {len(found.files)} files, {human(nbytes)}, and {what}")
    if found.removed:
        show(f"of an earlier push: {len(found.removed)} shards {'to go' if dry_run else 'gone'}")
    if dry_run and found.card is not None:
        show("\n" + found.card)
