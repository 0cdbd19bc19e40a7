"""First matrices of feed-forward blocks of which few rows are multiplied: `predict=True`, lossy.

A predictor names the neurons that may be active, from the block's input (PowerInfer, arXiv
2312.12456; Deja Vu, arXiv 2310.17157). All others are taken for inactive, so that what comes out is
the model's own but for the active ones that it missed. Never the default.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn

from endor.checkpoint.predictors import Predictor, Predictors, read_predictors
from endor.errors import ConfigError
from endor.hf.linear import EndorLinear
from endor.storage import FileLayout


class PredictedRows:
    """Names the rows of one first matrix.

    For several tokens together, neurons that one of them may have active are multiplied for all.

    Args:
        predictor: From the checkpoint.
    """

    lossy = True

    def __init__(self, predictor: Predictor) -> None:
        down, up = (
            torch.from_numpy(bits.copy()).view(torch.bfloat16).float()
            for bits in (predictor.down, predictor.up)
        )
        # wide, and the second turned: torch's product of one row then is the fastest
        self._down, self._up = down, up.T.contiguous()
        self._bias = torch.from_numpy(predictor.bias.copy())

    def rows(self, input: torch.Tensor) -> np.ndarray | None:
        """Return the rows that may give an active neuron."""
        x = input.detach().reshape(-1, self._down.shape[1]).float()
        scores = torch.addmm(self._bias, x @ self._down.T, self._up)
        named = (scores > 0).any(0) if len(scores) > 1 else scores[0] > 0
        return np.flatnonzero(named.numpy()).astype(np.uint32)


def open_predictors(path: Path, layouts: Sequence[FileLayout]) -> Predictors:
    """Return the predictors of the checkpoint `path` that shall be loaded with them.

    Raises:
        ConfigError: It has none.
        CheckpointError, FormatError: They are damaged.
    """
    found = read_predictors(path, layouts)
    if found is None:
        raise ConfigError(
            f"{path}: has no predictors: pack the model with --neurons --predict, where its "
            "activation is exactly zero for many neurons, or leave predict out"
        )
    return found


def predict_rows(model: nn.Module, found: Predictors) -> list[str]:
    """Have the first matrices of a model multiply the rows that are named; return their names.

    Raises:
        ConfigError: None of them is multiplied from its packed form by the processor.
    """
    taken = []
    for layer in model.modules():
        if not isinstance(layer, EndorLinear) or layer.exact:
            continue
        source = layer.source
        names = {part.tensor for part, _ in source.parts}
        if source.takes_rows and names <= found.matrices.keys():
            (name,) = names
            layer.choice = PredictedRows(found.matrices[name])
            taken.append(name)
    if found.matrices and not taken:
        raise ConfigError(
            "predict=True is for weights that the processor multiplies from their packed form, and "
            "none of those with a predictor is one: leave predict out"
        )
    return taken
