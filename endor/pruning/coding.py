"""The matrices of one layer in codes, gathered as they are stored."""

import torch

from endor.checkpoint.sources.contract import CheckpointSource
from endor.packed import torch_dtype
from endor.pruning.contract import Coded, LayerQuantizer
from endor.pruning.layer import Matrix


class LayerCoder:
    """Hands the matrices of a layer to a quantizer, one by one, and keeps what it returns.

    Args:
        source: The dense checkpoint.
        quantizer: Turns a matrix into codes.
    """

    def __init__(self, source: CheckpointSource, quantizer: LayerQuantizer) -> None:
        self._source = source
        self._quantizer = quantizer
        self._found: dict[str, list[tuple[Matrix, Coded]]] = {}

    def solve(self, matrix: Matrix, gram: torch.Tensor) -> torch.Tensor:
        """Return what a matrix is after it was quantised."""
        dtype = torch_dtype(self._source.tensors[matrix.name].dtype)
        weight = matrix.weight.contiguous()
        one = self._quantizer.quantize(matrix.name, weight, gram, dtype)
        self._found.setdefault(matrix.name, []).append((matrix, one))
        return one.values

    def stored(self) -> dict[str, torch.Tensor]:
        """Return codes and steps of each tensor, on the CPU, by `codes_of` and `steps_of`."""
        stored = {}
        for name, parts in self._found.items():
            parts.sort(key=lambda one: one[0].part.expert or 0)
            turned = parts[0][0].transposed
            codes = [one.codes.T if turned else one.codes for _, one in parts]
            steps = torch.stack([one.steps for _, one in parts])
            shape = self._source.tensors[name].shape
            stored[codes_of(name)] = torch.stack(codes).reshape(shape).cpu().contiguous()
            stored[steps_of(name)] = (steps.reshape(-1, 1) if turned else steps).cpu()
        return stored


def codes_of(name: str) -> str:
    """Return the name of the codes, int16 of the tensor's shape, of a quantised tensor."""
    return f"{name}:codes"


def steps_of(name: str) -> str:
    """Return the name of the steps, float32, laid out as `codecs.integer.encode` takes them."""
    return f"{name}:steps"
