"""Ids of models on the Hub, as people write them."""

import os
import re
from dataclasses import dataclass
from pathlib import Path

from endor.errors import ConfigError

_ID = re.compile(
    r"(?P<repo>[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95})(?:@(?P<revision>\S+))?"
)
_ODD = re.compile(r"--|\.\.|\.git$|[.-](/|$)")
"""What the Hub does not allow in a name."""


@dataclass(frozen=True, slots=True)
class HubName:
    """A model on the Hub.

    Attributes:
        repo: `org/name`.
        revision: A branch, tag or commit; None for the main branch.
    """

    repo: str
    revision: str | None = None

    def __str__(self) -> str:
        return self.repo if self.revision is None else f"{self.repo}@{self.revision}"


def is_id(text: str) -> bool:
    """Whether a text is the id of a model, `org/name`, as the Hub allows it."""
    match = _ID.fullmatch(text)
    return match is not None and match["revision"] is None and not _ODD.search(text)


def hub_name(model: Path | str, revision: str | None = None) -> HubName | None:
    """Return the model on the Hub that `model` names; None where it is a path.

    `org/name`, or `org/name@revision`. What is there by that name on this machine goes first.

    Args:
        model: What a user gave.
        revision: A branch, tag or commit, given besides.

    Raises:
        ConfigError: A revision was given of what is no model on the Hub, or two of them.
    """
    text = str(model)
    match = _ID.fullmatch(text)
    if match is None or _ODD.search(match["repo"]) or os.path.lexists(text):
        if revision is not None:
            raise ConfigError(
                f"{text}: is a path, and a revision ({revision}) is for a model on the Hub, given "
                "as org/name"
            )
        return None
    repo, inside = match["repo"], match["revision"]
    wanted = inside or revision
    if wanted is not None and os.path.lexists(repo):
        raise ConfigError(
            f"{repo}: is there on this machine, which goes before the Hub and has no revision "
            f"{wanted}; leave the revision out, or run where no such folder is"
        )
    if inside is not None and revision not in (None, inside):
        raise ConfigError(f"{text}: names revision {inside}, and {revision} was given; give one")
    return HubName(repo, wanted)


def repository_name(text: str) -> HubName:
    """Return a repository to write to, whatever is on this machine by that name.

    Raises:
        ConfigError: It is no id, or names a revision.
    """
    if not is_id(text):
        raise ConfigError(f"{text}: must be the id of a model on the Hub, ORG/NAME")
    return HubName(text)
