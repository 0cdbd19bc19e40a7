"""Calibration windows on their way through a model: embedded once, then a batch at a time."""

from pathlib import Path

import torch

from endor.pruning.activations import Activations
from endor.pruning.skeleton import Call, Skeleton

BATCH_TOKENS = 2048
"""Tokens of the windows that pass through a layer together."""


def batch_windows(tokens: int) -> int:
    """Return how many windows of so many tokens pass through a layer together."""
    return max(1, BATCH_TOKENS // tokens)


def embedded(
    skeleton: Skeleton, ids: torch.Tensor, budget_bytes: int, scratch: Path
) -> tuple[Activations, list[Call]]:
    """Return the hidden states before the first layer, and what each layer is called with besides.

    Args:
        skeleton: The model.
        ids: int64 `(windows, tokens)`.
        budget_bytes: Most bytes of hidden states in memory; the rest goes to a file.
        scratch: Where that is.

    Raises:
        PruningError: See `Skeleton.trace`.
    """
    stored: list[Activations] = []

    def sink(start: int, hidden: torch.Tensor) -> None:
        if not stored:
            shape = (*ids.shape, hidden.shape[-1])
            stored.append(Activations(shape, budget_bytes, scratch))
        stored[0].write(start, hidden)

    calls = skeleton.trace(ids, batch_windows(ids.shape[1]), sink)
    return stored[0], calls
