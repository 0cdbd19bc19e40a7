"""A packed checkpoint to the Hub, in one commit, with a card."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from endor.checkpoint.directory import PACKED_INDEX_NAME
from endor.checkpoint.index import SHARD_NAME, published_files, read_packed_index
from endor.checkpoint.located import hub_bars
from endor.errors import CheckpointError, HubError
from endor.hub.client import hub, hub_errors, look_up, patiently, read_part
from endor.hub.names import HubName, repository_name
from endor.sharing.card import CARD_NAME, MARK, CardFacts, model_card, own_readme

Card = Literal["auto", "new", "keep"]
_UNREMARKABLE = {".gitattributes", CARD_NAME}
"""Files of a repository that is as good as empty."""


@dataclass(frozen=True, slots=True)
class Push:
    """What is put where.

    Attributes:
        repo: The model on the Hub.
        files: What is uploaded, beside the card.
        removed: Shards of an earlier push that are no part of this one.
        card: The text of README.md; None where the one that is there stays.
        url: The commit or the pull request; empty before.
    """

    repo: str
    files: tuple[str, ...]
    removed: tuple[str, ...]
    card: str | None
    url: str = ""


def push_checkpoint(
    packed: Path | str,
    repo: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    over_others: bool = False,
    card: Card = "auto",
    facts: CardFacts | None = None,
    dry_run: bool = False,
    bars: bool = False,
) -> Push:
    """Upload a packed checkpoint and its card; return what was, or would be, uploaded.

    Nothing but what was published with the checkpoint goes up, and its README.md. Nothing in
    `packed` is changed.

    Args:
        packed: The checkpoint.
        repo: `org/name`; made if it is not there.
        private: Whether a repository that is made is private; as the account says when omitted.
        revision: A branch, made if it is not there.
        create_pr: Propose the commit instead of making it.
        over_others: Put it into a repository that holds other files already.
        card: "auto" makes a card unless a person wrote a README, here or there; "new" makes one in
            any case, "keep" never.
        facts: What the card says besides.
        dry_run: Look, and upload nothing.
        bars: Whether huggingface_hub may show its progress.

    Raises:
        ConfigError: `repo` is no id.
        CheckpointError: `packed` is no packed checkpoint.
        HubError: No access, no connection, or the repository holds other files.
    """
    packed = Path(packed)
    name = repository_name(repo)
    index = read_packed_index(packed)
    files = published_files(packed / PACKED_INDEX_NAME)
    if files is None:
        raise CheckpointError(
            f"{packed}: its index is an older one that lists no files; pack it again to push it"
        )
    missing = sorted(file for file in files if not (packed / file).is_file())
    if missing:
        raise CheckpointError(f"{packed}: {missing[0]} is missing; copy the checkpoint again")
    there = _files_there(name, revision)
    ours = {file for file in there if SHARD_NAME.fullmatch(file)} | {PACKED_INDEX_NAME}
    strangers = sorted(there - ours - _UNREMARKABLE - files)
    occupied = strangers if PACKED_INDEX_NAME in there else sorted(there - _UNREMARKABLE)
    if occupied and not (over_others or create_pr or dry_run):
        raise HubError(
            f"{repo}: holds {occupied[0]}"
            + (f" and {len(occupied) - 1} more" * bool(occupied[1:]))
            + " already; add --yes to put the packed model beside it, or --create-pr to propose it"
        )
    mine = own_readme(packed)
    uploaded = set(files) - {CARD_NAME}
    text = None
    if card == "new" or (card == "auto" and not mine and _may_replace(name, there, revision)):
        about = facts or CardFacts()
        text = model_card(packed, CardFacts(about.repo or repo, about.base, about.evaluation))
    elif mine:
        uploaded.add(CARD_NAME)
    removed = sorted(ours - set(index.files) - {PACKED_INDEX_NAME})
    found = Push(repo, tuple(sorted(uploaded)), tuple(removed), text)
    if dry_run:
        return found
    with hub_bars(bars):
        return _upload(packed, name, found, private, revision, create_pr)


def _files_there(name: HubName, revision: str | None) -> set[str]:
    """Return the files of a repository; none where it is not there yet, or that branch."""
    kinds = hub().errors

    def once() -> set[str]:
        with hub_errors(name):
            try:
                return set(hub().HfApi().list_repo_files(name.repo, revision=revision))
            except kinds.GatedRepoError:
                raise
            except (kinds.RepositoryNotFoundError, kinds.RevisionNotFoundError):
                return set()

    there: set[str] = patiently(once)
    return there


def _may_replace(name: HubName, there: Iterable[str], revision: str | None) -> bool:
    """Whether the README on the Hub is of our making, or there is none."""
    if CARD_NAME not in there:
        return True
    repository = patiently(lambda: look_up(HubName(name.repo, revision)))
    nbytes = repository.files[CARD_NAME].nbytes
    return not nbytes or MARK.encode() in read_part(repository, CARD_NAME, 0, nbytes)


def _upload(
    packed: Path,
    name: HubName,
    push: Push,
    private: bool | None,
    revision: str | None,
    create_pr: bool,
) -> Push:
    library = hub()
    add, delete = library.CommitOperationAdd, library.CommitOperationDelete
    with hub_errors(name):
        api = library.HfApi()
        api.create_repo(name.repo, private=private, exist_ok=True)
        if revision is not None and not create_pr:
            api.create_branch(name.repo, branch=revision, exist_ok=True)
        operations = [add(file, str(packed / file)) for file in push.files]
        if push.card is not None:
            operations.append(add(CARD_NAME, push.card.encode()))
        operations += [delete(file) for file in push.removed]
        done = api.create_commit(
            name.repo,
            operations,
            commit_message=f"Packed by Endor: {len(push.files)} files",
            revision=revision,
            create_pr=create_pr or None,
        )
    return Push(push.repo, push.files, push.removed, push.card, done.pr_url or done.commit_url)
