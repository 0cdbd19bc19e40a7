"""One pruning of a checkpoint, by whatever method: what a conversion then reads, and applies."""

from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

from endor.checkpoint.reading import WeightPruner
from endor.checkpoint.sources.contract import CheckpointSource
from endor.errors import ConfigError
from endor.pruning.contract import METHODS, NOTHING, Progress, PruneOptions

Prune = str | PruneOptions | WeightPruner | None
"""How to prune: a method's name, all there is to say about it, an object that does it, or not."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """What to convert.

    Attributes:
        source: Yields tensors, pruned and quantised already if that takes calibration.
        pruner: To be applied to them; None for nothing.
        description: How the pruning was done; empty for none.
        quantized: How the quantisation was done; empty for none.
    """

    source: CheckpointSource
    pruner: WeightPruner | None = None
    description: Mapping[str, Any] = field(default_factory=dict)
    quantized: Mapping[str, Any] = field(default_factory=dict)


def resolved(prune: Prune, sparsity: float, pattern: str) -> PruneOptions | WeightPruner:
    """Return options for a method's name, or None; what is neither as it is.

    Raises:
        ConfigError: There is no such method, or its options make no sense.
    """
    if prune is None or prune == NOTHING.name:
        return PruneOptions(method=NOTHING.name)
    if not isinstance(prune, str):
        return prune
    if prune not in METHODS:
        raise ConfigError(f"prune: must be none or one of {', '.join(METHODS)}, got {prune!r}")
    return PruneOptions(method=prune, sparsity=sparsity, pattern=pattern)


def is_calibrated(prune: PruneOptions | WeightPruner) -> bool:
    """Whether a pruning needs calibration text."""
    return isinstance(prune, PruneOptions) and METHODS.get(prune.method, NOTHING).calibrated


def weight_pruner(prune: PruneOptions | WeightPruner) -> WeightPruner | None:
    """Return what prunes a weight by itself; None where nothing does, or calibration is needed."""
    if not isinstance(prune, PruneOptions):
        return prune
    if prune.method == NOTHING.name or is_calibrated(prune):
        return None
    return cast(WeightPruner, METHODS[prune.method].create(prune))


def described(pruner: WeightPruner) -> dict[str, Any]:
    """Return what config.json says about a pruner."""
    describe = getattr(pruner, "describe", None)
    return dict(describe()) if describe else {"method": type(pruner).__name__.lower()}


@contextmanager
def prepared(
    source: CheckpointSource,
    prune: PruneOptions | WeightPruner,
    selected: frozenset[str],
    *,
    progress: Progress | None = None,
) -> Iterator[Prepared]:
    """Yield what to convert so that `selected` tensors come out pruned.

    A method that looks at weights only is a pruner on the plain source; a calibrated one is a
    source that computes layer after layer as its tensors are asked for.

    Args:
        source: The dense checkpoint; stays open.
        prune: From `resolved`.
        selected: Names of the tensors to prune.
        progress: Called with layers done, layers in all, and what goes on.

    Raises:
        PruningError, ConfigError, BackendError: See `PrunedSource`.
    """
    if isinstance(prune, PruneOptions) and is_calibrated(prune):
        from endor.pruning.source import PrunedSource

        with closing(PrunedSource(source, prune, selected, progress=progress)) as found:
            yield Prepared(found, None, found.describe())
        return
    pruner = weight_pruner(prune)
    yield Prepared(source, pruner, {} if pruner is None else described(pruner))
