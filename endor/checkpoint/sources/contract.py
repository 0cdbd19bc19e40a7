"""What a conversion needs to know about a checkpoint, whatever its files look like."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from endor.codecs import DType
from endor.codecs.codes import Codes


@dataclass(frozen=True, slots=True)
class SourceTensor:
    """One dense tensor of a checkpoint.

    Attributes:
        name: Its name in the checkpoint.
        dtype: Element type.
        shape: Dense shape.
        file: Name of the dense file that holds it, or would after unpacking.
    """

    name: str
    dtype: DType
    shape: tuple[int, ...]
    file: str

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.dtype.nbytes(self.numel)


class CheckpointSource(Protocol):
    """Dense tensors by name, read one at a time.

    A calibrated pruner wraps a source in another one that computes a layer when its first tensor is
    asked for; it sets `ordered`.

    Attributes:
        path: The directory or file, for messages.
        directory: Where config and tokenizer files lie; None for a lone weight file.
        tensors: Every tensor by name.
        ordered: Whether `read_into` must be called from one thread and in the order of the plan
            (execution order), because reading has state. Otherwise any thread, any order.
    """

    @property
    def path(self) -> Path: ...

    @property
    def directory(self) -> Path | None: ...

    @property
    def tensors(self) -> Mapping[str, SourceTensor]: ...

    @property
    def ordered(self) -> bool: ...

    def read_into(self, name: str, out: np.ndarray) -> None:
        """Fill `out`, uint8 of exactly the tensor's `nbytes`, with its dense bytes.

        Raises:
            CheckpointError: the bytes cannot be had.
        """
        ...

    def config(self) -> dict[str, Any] | None:
        """Return config.json as the dense checkpoint has it; None when there is none."""
        ...

    def fingerprint(self) -> str:
        """Return a string that changes when the files do."""
        ...

    def close(self) -> None:
        """Give up files and buffers."""
        ...


@runtime_checkable
class CodedSource(CheckpointSource, Protocol):
    """A source whose quantised tensors can be had as codes, besides as dense bytes."""

    def coded(self, name: str) -> Codes | None:
        """Return codes and steps of a tensor; None of what is not quantised.

        The dense bytes of the tensor are what codes and steps decode to.
        """
        ...

    def outcome(self) -> dict[str, Any]:
        """Return what config.json says besides of the quantisation, once all tensors are read."""
        ...


@runtime_checkable
class FetchingSource(CheckpointSource, Protocol):
    """A source that has to fetch what is read, and wants to know it before.

    Attributes:
        most_shards: Files of the source that were on disk at once, at most, so far.
    """

    @property
    def most_shards(self) -> int: ...

    def expect(self, names: Sequence[str]) -> int:
        """Say which tensors will be read, once each, about in this order."""
        ...

    def cancel(self) -> None:
        """Let whoever waits for a tensor fail at once."""
        ...


def fetching(source: CheckpointSource) -> FetchingSource | None:
    """Return what a source reads from, through those that wrap another, if that has to fetch."""
    found: object = source
    while not isinstance(found, FetchingSource):
        found = getattr(found, "wrapped", None)
        if found is None:
            return None
    return found
