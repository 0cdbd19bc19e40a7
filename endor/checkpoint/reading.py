"""Reading tensors of a source into pooled buffers, and pruning them."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

from endor.checkpoint.pipeline import BufferPool, budget_for
from endor.checkpoint.sources.contract import CheckpointSource, SourceTensor
from endor.errors import PruningError
from endor.packed import tensor_of
from endor.storage import HostBuffer

if TYPE_CHECKING:
    import torch


class WeightPruner(Protocol):
    """A method that looks at nothing but the weight."""

    def prune(self, name: str, weight: "torch.Tensor") -> "torch.Tensor":
        """Return `weight` (any float dtype, 2-D, or 3-D of stacked experts) with its zeros set.

        Survivors keep their bits.
        """
        ...


@dataclass(slots=True)
class Loaded:
    """A tensor in a pooled buffer.

    Attributes:
        tensor: Which.
        buffer: Where; goes back to the pool.
        bits: Its elements over the buffer, unsigned, of its shape; flat bytes where they are
            narrower than one.
    """

    tensor: SourceTensor
    buffer: HostBuffer
    bits: np.ndarray


class TensorLoader:
    """Loads tensors of one source, pruned where they are selected.

    Args:
        source: Where from.
        pruner: Applied to the selected tensors; None leaves all as they are.
        selected: Names of tensors to prune.
    """

    def __init__(
        self, source: CheckpointSource, pruner: WeightPruner | None, selected: frozenset[str]
    ) -> None:
        sizes = [tensor.nbytes for tensor in source.tensors.values()]
        self.budget_bytes = budget_for(max(sizes, default=0))
        self.pool = BufferPool(self.budget_bytes)
        self.source = source
        self._pruner = pruner
        self._selected = selected
        self._prepared: dict[str, Loaded] = {}

    def prepare(self, tensor: SourceTensor) -> None:
        """Read in order, on the consumer's thread, what a source with state demands so."""
        if self.source.ordered:
            self._prepared[tensor.name] = self._read(tensor)

    def load(self, tensor: SourceTensor) -> Loaded:
        """Return the tensor, read and pruned."""
        loaded = self._prepared.pop(tensor.name, None) or self._read(tensor)
        if self._pruner is not None and tensor.name in self._selected:
            prune_in_place(self._pruner, tensor, loaded.bits)
        return loaded

    def _read(self, tensor: SourceTensor) -> Loaded:
        buffer = self.pool.take(tensor.nbytes)
        out = buffer.array[: tensor.nbytes]
        self.source.read_into(tensor.name, out)
        return Loaded(tensor, buffer, _shaped(out, tensor))


def _shaped(out: np.ndarray, tensor: SourceTensor) -> np.ndarray:
    shape = tensor.dtype.unit_shape(tensor.shape)
    bits: np.ndarray = out.view(tensor.dtype.uint).reshape(shape)
    return bits


def prune_in_place(pruner: WeightPruner, tensor: SourceTensor, bits: np.ndarray) -> None:
    """Prune `bits`; a pruner that works on bits is spared the way through torch.

    Raises:
        PruningError: the pruner returned another shape or dtype.
    """
    on_bits = getattr(pruner, "prune_bits", None)
    if on_bits is not None:
        on_bits(tensor.name, bits, tensor.dtype)
        return
    weight = tensor_of(bits, tensor.dtype)
    pruned = pruner.prune(tensor.name, weight)
    if pruned.shape != weight.shape or pruned.dtype != weight.dtype:
        raise PruningError(
            f"{tensor.name}: the pruner must return {weight.dtype} {tuple(weight.shape)}, "
            f"got {pruned.dtype} {tuple(pruned.shape)}"
        )
    weight.copy_(pruned)
