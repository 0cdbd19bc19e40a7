"""Which commit of which model on the Hub a folder of huggingface_hub's cache is."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from endor.hub.names import is_id

_REPOSITORY = "models--"
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True, slots=True)
class Origin:
    """A model on the Hub at one commit.

    Attributes:
        repo: `org/name`.
        commit: Its commit, 40 hexadecimal digits.
    """

    repo: str
    commit: str

    def __str__(self) -> str:
        return f"{self.repo} at {self.commit}"

    @property
    def url(self) -> str:
        """Its page on the Hub."""
        return f"https://huggingface.co/{self.repo}/tree/{self.commit}"

    def to_dict(self) -> dict[str, str]:
        """Return it as a packed checkpoint's config.json has it."""
        return {"repo": self.repo, "commit": self.commit}

    @classmethod
    def of_path(cls, path: Path) -> "Origin | None":
        """Return what lies at `path`, or around it; None for a path outside of the cache.

        The cache keeps a commit's files in `models--ORG--NAME/snapshots/COMMIT`.
        """
        parts = path.absolute().parts
        for at in range(len(parts) - 3, -1, -1):
            folder, middle, commit = parts[at : at + 3]
            if folder.startswith(_REPOSITORY) and middle == "snapshots":
                return cls._checked(folder.removeprefix(_REPOSITORY).replace("--", "/", 1), commit)
        return None

    @classmethod
    def of_config(cls, section: Mapping[str, Any]) -> "Origin | None":
        """Return what a packed checkpoint's `quantization_config` says; None for nothing usable."""
        said = section.get("source")
        if not isinstance(said, Mapping):
            return None
        return cls._checked(said.get("repo"), said.get("commit"))

    @classmethod
    def _checked(cls, repo: Any, commit: Any) -> "Origin | None":
        fine = isinstance(repo, str) and is_id(repo) and isinstance(commit, str)
        return cls(repo, commit) if fine and _COMMIT.fullmatch(commit) else None
