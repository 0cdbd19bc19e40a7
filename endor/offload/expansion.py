"""How the packed parts of one weight become numbers: what both processors share."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch

from endor.codecs import DType, TensorSpec
from endor.dtypes import torch_dtype
from endor.offload.mover import Mover
from endor.offload.state import State
from endor.planning.units import Part, WeightSpec

PRODUCT_DTYPES = {"BF16", "F16", "F32"}


class Expansion(ABC):
    """The packed parts of one weight, with the kernels of the processor that uses it.

    Args:
        mover: Brings its units.
        spec: The weight.
        states: State of the unit of each part.
        item: Stored element type.
        dtype: Element type that callers see; the stored one is converted when it differs.

    Attributes:
        states: State of each of its units, once.
        whole: Whether its parts are rows of whole stored matrices, in a type that products take.
        converts: Whether the stored type is another than callers see.
        turned: Whether any of its matrices is stored transposed.
    """

    def __init__(
        self,
        mover: Mover[Any],
        spec: WeightSpec,
        states: Sequence[State],
        item: DType,
        dtype: torch.dtype,
    ) -> None:
        self.mover = mover
        self.name = spec.name
        self.shape = torch.Size(spec.shape)
        self.numel = self.shape.numel()
        self.dtype = dtype
        self.item = item
        self.parts = tuple(zip(spec.parts, states, strict=True))
        self.states = tuple(dict.fromkeys(states))
        self.converts = torch_dtype(item) != dtype
        self.whole = all(self._covers_rows(part, state) for part, state in self.parts)
        self.turned = any(_spec(part, state).transposed for part, state in self.parts)
        self.packed_nbytes = sum(_share(part, state) for part, state in self.parts)

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where the dense matrix is."""

    @property
    def multiplies(self) -> bool:
        """Whether `product` applies."""
        return self.whole and not self.converts

    @abstractmethod
    def scratch(self, *, hold: bool) -> torch.Tensor:
        """Return the matrix in this thread's scratch memory; see `Weight.dense`."""

    @abstractmethod
    def fresh(self, *, hold: bool) -> torch.Tensor:
        """Return the matrix in memory of its own."""

    @abstractmethod
    def product(self, inputs: torch.Tensor, *, hold: bool) -> torch.Tensor:
        """Return `inputs @ matrix.T` from the packed form; see `Weight.product`."""

    @abstractmethod
    def panels(self, inputs: torch.Tensor, *, hold: bool) -> torch.Tensor:
        """Return `inputs @ matrix.T` in float32, some rows expanded at a time."""

    @abstractmethod
    def forget(self) -> None:
        """Let go of what refers to the mover's memory."""

    def _covers_rows(self, part: Part, state: State) -> bool:
        spec = _spec(part, state)
        return (
            spec.codec != "dense"
            and spec.dtype.name in PRODUCT_DTYPES
            and len(self.shape) == 2
            and spec.shape[-1:] == self.shape[1:]
            and len(spec.shape) == 2
            and part.stop - part.start == spec.numel
        )


def _share(part: Part, state: State) -> int:
    """Packed bytes that a part stands for."""
    spec = _spec(part, state)
    return spec.nbytes * (part.stop - part.start) // max(1, spec.numel)


def _spec(part: Part, state: State) -> TensorSpec:
    return state.unit.layout.tensors[part.tensor].spec
