"""A source that passes another one's tensors on, some of them changed."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from endor.checkpoint.sources.contract import CheckpointSource, SourceTensor


class WrappedSource:
    """All of a source as it is, for others to change a part of it.

    Args:
        source: Stays open, and is not closed here.
        identity: What the change is, for the fingerprint.
    """

    def __init__(self, source: CheckpointSource, identity: str) -> None:
        self._source = source
        self._identity = identity
        self.ordered = source.ordered

    @property
    def wrapped(self) -> CheckpointSource:
        """The source itself."""
        return self._source

    @property
    def path(self) -> Path:
        return self._source.path

    @property
    def directory(self) -> Path | None:
        return self._source.directory

    @property
    def tensors(self) -> Mapping[str, SourceTensor]:
        return self._source.tensors

    def read_into(self, name: str, out: np.ndarray) -> None:
        self._source.read_into(name, out)

    def config(self) -> dict[str, Any] | None:
        return self._source.config()

    def fingerprint(self) -> str:
        return f"{self._source.fingerprint()}:{self._identity}"

    def close(self) -> None:
        """Nothing to give up."""
