"""Pieces: rows of a parameter that are rows, or columns, of one stored tensor."""

from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from endor.errors import ShapeError

TENSOR = 1 << 40
"""Between the row numbers of two stored tensors."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Rows of a parameter that are rows, or columns, of one stored tensor.

    A row is what the last dimension spans; of one-dimensional tensors, a single element.

    Attributes:
        name: The stored tensor.
        start: Its first row, all dimensions but the last counted as one.
        step: From each of its rows to the next.
        at: First row of the parameter.
        rows: How many rows of the parameter.
        width: Elements of a row of the parameter.
        turned: Whether the stored matrix is the transposed one.
    """

    name: str
    start: int
    step: int
    at: int
    rows: int
    width: int
    turned: bool = False

    def view(self, parameter: torch.Tensor) -> torch.Tensor:
        """Return `(rows, width)` of `parameter`, a view."""
        return parameter.view(-1, self.width)[self.at : self.at + self.rows]

    def stored(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return `(rows, width)` of the stored tensor, a view."""
        if self.turned:
            return tensor.view(-1, self.rows)[self.start : self.start + self.width].T
        stop = self.start + (self.rows - 1) * self.step + 1
        return tensor.view(-1, self.width)[self.start : stop : self.step]


Pieces = tuple[Piece, ...]


def runs(rows: np.ndarray, names: Sequence[str], width: int, each: int | None) -> Pieces:
    """Return the pieces of a parameter: runs of its rows at equal steps in one stored tensor.

    Args:
        rows: What each of its rows is: the number of a stored tensor times `TENSOR`, and a row of
            that tensor.
        names: Of the stored tensors.
        width: Elements of a row.
        each: Rows of one of its matrices, whose bounds no piece crosses; None for one matrix.
    """
    out: list[Piece] = []
    if not len(rows) or not width:
        return ()
    steps = np.diff(rows)
    bounds = np.flatnonzero(np.diff(rows // TENSOR)) + 1
    if each is not None:
        bounds = np.union1d(bounds, np.arange(each, len(rows), each))
    for start, stop in zip([0, *bounds], [*bounds, len(rows)], strict=True):
        at, stop = int(start), int(stop)
        turns = np.flatnonzero(np.diff(steps[at : stop - 1])) + at + 2
        ends = [*turns.tolist(), stop]
        while at < stop:
            end = ends[bisect_left(ends, min(at + 2, stop))]
            step = int(steps[at]) if end - at > 1 else 1
            if step < 1:
                end, step = at + 1, 1
            tensor, row = divmod(int(rows[at]), TENSOR)
            out.append(Piece(names[tensor], row, step, at, end - at, width))
            at = end
    return tuple(out)


def is_whole(
    pieces: Sequence[Piece], shape: Iterable[int], shapes: Mapping[str, tuple[int, ...]]
) -> bool:
    """Whether pieces of a parameter of `shape` are all of it, and one stored tensor as it is."""
    return (
        len({piece.name for piece in pieces}) == 1
        and shapes[pieces[0].name] == tuple(shape)
        and all((piece.start, piece.step, piece.turned) == (piece.at, 1, False) for piece in pieces)
        and sum(piece.rows * piece.width for piece in pieces) == count(shape)
    )


def count(shape: Iterable[int]) -> int:
    """Return the elements of a shape."""
    return int(np.prod(tuple(shape), dtype=np.int64))


def wrong_shape(name: str, found: Any, target: str, expected: Iterable[int]) -> ShapeError:
    """Return the error that says so."""
    shapes = [list(shape) for shape in found] if isinstance(found, list) else [list(found)]
    return ShapeError(
        f"{name}: stored shape {', '.join(map(str, shapes))} does not fit {target} "
        f"{list(expected)}; the config and the weights do not belong together"
    )
