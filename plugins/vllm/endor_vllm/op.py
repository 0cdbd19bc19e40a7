"""`torch.ops.endor.linear`: a packed layer as one operator, which torch.compile leaves alone.

A graph holds the operator with the layer's bytes as an input. Which layer it is comes as a tensor
too, so that the graphs of equal layers are equal and are compiled once.
"""

from itertools import count
from weakref import WeakValueDictionary

import torch

from endor_vllm.matrix import Matrix

_numbers = count()
_matrices: WeakValueDictionary[int, Matrix] = WeakValueDictionary()
"""They belong to their layers, and go with them."""


def handle_of(matrix: Matrix) -> torch.Tensor:
    """Return what names `matrix` to the operator: its number, an integer on the CPU."""
    number = next(_numbers)
    _matrices[number] = matrix
    return torch.tensor(number, dtype=torch.int64, device="cpu")


def matrices() -> dict[int, Matrix]:
    """Return the matrices of the models that this process holds, by number."""
    return dict(_matrices)


@torch.library.custom_op("endor::linear", mutates_args=())
def linear(
    x: torch.Tensor, data: torch.Tensor, bias: torch.Tensor | None, handle: torch.Tensor, rows: int
) -> torch.Tensor:
    """Return `x @ matrix.T + bias` for the layer that `handle` names; `rows` are the matrix's."""
    return _matrices[int(handle)].linear(x, data, bias)


@linear.register_fake
def _(
    x: torch.Tensor, data: torch.Tensor, bias: torch.Tensor | None, handle: torch.Tensor, rows: int
) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], rows))
