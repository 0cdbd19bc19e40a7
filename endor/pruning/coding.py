"""The matrices of one layer in codes, gathered as they are stored."""

import math
from collections.abc import Mapping, Sequence

import torch

from endor.checkpoint.sources.contract import CheckpointSource
from endor.dtypes import torch_dtype
from endor.errors import QuantizationError
from endor.pruning.contract import Coded, LayerQuantizer
from endor.pruning.layer import LayerMatrices, Matrix

LEAST_ROWS = 64
"""Rows that share a step at least, where a stored tensor holds matrices of unequal size."""


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
        weight = matrix.weight.contiguous()
        one = self._quantizer.quantize(matrix.name, weight, gram, self._dtype(matrix))
        self._found.setdefault(matrix.name, []).append((matrix, one))
        return one.values

    def survey(
        self, matrix: Matrix, gram: torch.Tensor, gradients: Mapping[int, torch.Tensor]
    ) -> torch.Tensor:
        """Show the quantizer a matrix and return it as it is; `gradients` are those of `probe`."""
        weight = matrix.weight.contiguous()
        gradient = gradients.get(id(matrix.parameter))
        if gradient is not None:
            gradient = matrix.piece.view(gradient)
            gradient = gradient.T if matrix.transposed else gradient
        self._quantizer.survey(matrix.name, weight, gram, gradient, self._dtype(matrix))
        return weight

    def _dtype(self, matrix: Matrix) -> torch.dtype:
        return torch_dtype(self._source.tensors[matrix.name].dtype)

    def stored(self) -> dict[str, torch.Tensor]:
        """Return codes and steps of each tensor, on the CPU, by `codes_of` and `steps_of`."""
        stored = {}
        for name, parts in self._found.items():
            codes, steps = assemble(parts, self._source.tensors[name].shape)
            stored[codes_of(name)], stored[steps_of(name)] = codes.cpu(), steps.cpu()
        return stored


def codes_of(name: str) -> str:
    """Return the name of the codes, int16 of the tensor's shape, of a quantised tensor."""
    return f"{name}:codes"


def steps_of(name: str) -> str:
    """Return the name of the steps, float32, laid out as `codecs.integer.encode` takes them."""
    return f"{name}:steps"


def assemble(
    parts: Sequence[tuple[Matrix, Coded]], shape: tuple[int, ...]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return codes and steps of a stored tensor of `shape`.

    Args:
        parts: All matrices in it. A step is for an input of one of them: for a column of the
            stored matrix, or for a row where that is transposed.

    Raises:
        QuantizationError: The matrices lie so that too many steps would have to be stored.
    """
    device = parts[0][1].codes.device
    codes = torch.empty(shape, dtype=torch.int16, device=device)
    rows, cols = math.prod(shape[:-1]), shape[-1]
    by_row = {matrix.turns for matrix, _ in parts} == {True}
    each = 1 if by_row else block_rows([matrix for matrix, _ in parts])
    steps = torch.empty(rows // each, 1 if by_row else cols, device=device)
    for matrix, one in parts:
        piece = matrix.piece
        piece.stored(codes).copy_(one.codes.T if matrix.transposed else one.codes)
        if by_row:
            count = len(one.steps)
            steps[piece.start : piece.start + count, 0] = one.steps
        else:
            steps[piece.start // each : (piece.start + piece.rows) // each] = one.steps
    return codes, steps


def check_codable(matrices: LayerMatrices) -> None:
    """Raise `QuantizationError` where a tensor's matrices lie so that `assemble` refuses them."""
    for parts in matrices.by_name().values():
        if any(matrix.piece.step > 1 for matrix in parts) or not any(m.turns for m in parts):
            block_rows(parts)


def block_rows(matrices: Sequence[Matrix]) -> int:
    """Return how many rows of a stored tensor share a step of a column.

    Raises:
        QuantizationError: As for `assemble`.
    """
    pieces = [matrix.piece for matrix in matrices]
    if any(piece.step > 1 for piece in pieces):
        raise QuantizationError(
            f"{matrices[0].name}: holds the rows of several matrices by turns, which have steps of "
            "their own; leave it out (--exclude)"
        )
    each = math.gcd(*(piece.start for piece in pieces), *(piece.rows for piece in pieces))
    if each < LEAST_ROWS and any(piece.rows != each for piece in pieces):
        raise QuantizationError(
            f"{matrices[0].name}: holds matrices of unequal size, whose steps would take too much "
            f"(one for {each} rows); leave it out (--exclude)"
        )
    return each
