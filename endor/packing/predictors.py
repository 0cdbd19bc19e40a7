"""Making what guesses active neurons: of the model as it was packed."""

from collections.abc import Iterator, Mapping
from contextlib import closing
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from endor.checkpoint.companions import PREDICTORS_NAME
from endor.checkpoint.neurons import first_matrices, predicted_matrix
from endor.checkpoint.pack_options import Made
from endor.checkpoint.predictors import Predictor, Predictors
from endor.checkpoint.sources.contract import CheckpointSource
from endor.checkpoint.sources.packed import PackedSource
from endor.errors import ConfigError
from endor.kernels.chosen import takes_rows
from endor.packing.neurons import scratch_folder, stored_by_neuron, windows_for
from endor.pruning.contract import Progress, PruneOptions

if TYPE_CHECKING:
    import torch

    from endor.pruning.feed_forward import FeedForwardPasses

RECALL = 0.99
"""Share of the active neurons that shall be named, unless another is asked for."""

TOKENS = 24576
"""Tokens that a predictor is made from and tried on: more hardly change it."""

USEFUL = 0.6
"""Where a predictor names more of the neurons than this, there is none: all rows are as fast."""


def check_recall(recall: float) -> None:
    """Raise `ConfigError` unless it is a share that can be asked for."""
    if not 0.5 <= recall < 1:
        raise ConfigError(f"recall: must be from 0.5 to below 1, got {recall}; 0.99 is usual")


def predicting(
    source: CheckpointSource,
    options: PruneOptions,
    matrices: frozenset[str],
    recall: float,
    progress: Progress | None = None,
) -> Mapping[str, Made]:
    """Return what makes the file of predictors, given a packed checkpoint; see `counting`.

    Args:
        source: The model, before it is packed.
        options: How to calibrate; nothing is pruned.
        matrices: Names of those that are stored by neuron.
        recall: Share of the active neurons that shall be named.
        progress: Called with layers done, layers in all, and what goes on.

    Raises:
        PruningError, CheckpointError, BackendError, ConfigError: As there.
    """
    from endor.pruning.feed_forward import FeedForwardPasses
    from endor.pruning.source import explained

    ids, about = windows_for(source, options, matrices, TOKENS)

    def make(folder: Path) -> bytes:
        with closing(PackedSource(folder)) as packed, explained(folder):
            specs = {n: entry.spec for each in packed.layouts for n, entry in each.tensors.items()}
            first_of = {name: predicted_matrix(name, specs) for name in stored_by_neuron(packed)}
            firsts = {
                name: first
                for name, first in first_of.items()
                if first is not None and takes_rows(specs[first])
            }
            found: dict[str, Predictor] = {}
            tokens = 0
            if firsts:
                wanted = {name: first_matrices(name) for name in firsts}
                passes = FeedForwardPasses(packed, options, wanted)
                with scratch_folder(options) as scratch:
                    for name, predictor, count in _fitted(passes, ids, scratch, recall, progress):
                        tokens = count
                        if predictor.rows <= USEFUL:
                            found[firsts[name]] = predictor
            return Predictors(found, recall, tokens, about).to_bytes(packed.layouts)

    return {PREDICTORS_NAME: make}


def _fitted(
    passes: "FeedForwardPasses",
    ids: "torch.Tensor",
    scratch: Path,
    recall: float,
    progress: Progress | None,
) -> Iterator[tuple[str, Predictor, int]]:
    """Yield the second matrix of each block, its predictor, and the tokens that was tried on."""
    import torch

    from endor.pruning.prediction import Activity, fit

    def tell(done: int, total: int, what: str) -> None:
        if progress is not None:
            progress(done, total, what.replace("counting", "predictors"))

    for _, layer in groupby(passes.run(ids, scratch, tell), key=lambda seen: seen.block.layer):
        activity: dict[str, Activity] = {}
        for seen in layer:
            activity.setdefault(seen.block.matrix, Activity()).add(seen.inputs, seen.activation)
        for name, each in activity.items():
            made = fit(each, recall=recall)
            down, up = (part.view(torch.uint16).numpy() for part in (made.down, made.up))
            shares = made.recall, made.rows, made.active
            yield name, Predictor(down, up, made.bias.numpy(), *shares), made.tokens
