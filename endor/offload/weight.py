"""A dense matrix that exists in packed form, ready to multiply by: what all processors share."""

import threading
import weakref
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
import torch

from endor.codecs import DType, TensorSpec
from endor.dtypes import torch_dtype
from endor.errors import ConfigError
from endor.offload.mover import Mover
from endor.offload.state import State
from endor.planning.products import NEVER, PANEL, PRODUCT_ROWS, Products
from endor.planning.units import Part, WeightSpec

PRODUCT_DTYPES = {"BF16", "F16", "F32"}


class Owner:
    """What a store and its weights share: when the last of them is gone, the mover is closed.

    Weights do not refer to their store, for that would be a cycle: `del model` would then leave
    the packed weights in memory until the garbage collector comes by.
    """

    def __init__(self, mover: Mover[Any]) -> None:
        weakref.finalize(self, _retire, mover).atexit = False


@dataclass(frozen=True, slots=True)
class Matrix:
    """One matrix of a model, as it is stored.

    Attributes:
        spec: Which parts of which tensors it is.
        states: State of the unit of each part.
        item: Stored element type.
        dtype: Element type that callers see; the stored one is converted when it differs.
        products: How weights are multiplied by layers that need not be exact.
        owner: Keeps the mover open.
    """

    spec: WeightSpec
    states: Sequence[State]
    item: DType
    dtype: torch.dtype
    products: Products
    owner: Owner


class Weight(ABC):
    """A dense matrix that exists in packed form; subclasses know a processor's kernels.

    Args:
        mover: Brings its units.
        matrix: What it is.

    Attributes:
        name: Its name in the model.
        shape: Dense shape.
        dtype: Element type that callers see.
        parts: Its packed parts, each with the state of its unit.
        states: State of each of its units, once.
        converts: Whether the stored type is another than callers see.
        turned: Whether any of its parts is stored transposed.
        packed_nbytes: Bytes of its packed parts.
        multiplies: Whether `product` applies: its parts are rows of whole stored matrices, in a
            type that the processor's products take.
        product_rows: Input rows up to which `product` is to be used; 0 where it cannot be.
        wide_rows: Input rows from which `wide` is to be used.
        takes_rows: Whether `product_of` applies.
    """

    takes_rows = False

    def __init__(self, mover: Mover[Any], matrix: Matrix) -> None:
        spec, products = matrix.spec, matrix.products
        self.mover = mover
        self.matrix = matrix
        self.name = spec.name
        self.shape = torch.Size(spec.shape)
        self.numel = self.shape.numel()
        self.item, self.dtype = matrix.item, matrix.dtype
        self.parts = tuple(zip(spec.parts, matrix.states, strict=True))
        self.states = tuple(dict.fromkeys(matrix.states))
        self.converts = torch_dtype(self.item) != self.dtype
        stored = [(part, spec_of(part, state)) for part, state in self.parts]
        self.turned = any(each.transposed for _, each in stored)
        self.packed_nbytes = sum(
            each.nbytes * (part.stop - part.start) // max(1, each.numel) for part, each in stored
        )
        self.multiplies = not self.converts and all(
            self._covers_rows(part, each) and self.takes(each) for part, each in stored
        )
        self.product_rows = 0
        if self.multiplies:
            self.product_rows = min(
                products.packed_rows.get(state.unit.name, PRODUCT_ROWS) for state in self.states
            )
        self.wide_rows = products.wide_rows if self.dtype.itemsize == 2 else NEVER

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where the dense matrix is."""

    def takes(self, spec: TensorSpec) -> bool:
        """Whether this processor's products take a matrix that is stored so."""
        return True

    @abstractmethod
    def dense(self, *, hold: bool = False) -> torch.Tensor:
        """Return the matrix in this thread's scratch: valid until its next weight is expanded.

        Args:
            hold: Keep its unit for the thread's next weight, which is in the same one; the caller
                sees to `Mover.drop`.
        """

    @abstractmethod
    def fresh(self, *, hold: bool = False) -> torch.Tensor:
        """Return the matrix in memory of its own; `hold` as for `dense`."""

    @abstractmethod
    def product(self, inputs: torch.Tensor, *, hold: bool = False) -> torch.Tensor:
        """Return `inputs @ matrix.T` from the packed form, in float32.

        Sums in float32 in an order of its own, so it differs from a product with the dense matrix
        by rounding.

        Args:
            inputs: `(batch, cols)` of the weight's dtype, contiguous, without gradient.
            hold: As for `dense`.

        Returns:
            `(batch, rows)`, float32, new.
        """

    def product_of(
        self, inputs: torch.Tensor, rows: np.ndarray, *, hold: bool = False
    ) -> torch.Tensor:
        """Return `product` with some rows of the matrix, where `takes_rows`; 0 for the others.

        Args:
            inputs: As for `product`.
            rows: Rows of the matrix, rising, u32.
            hold: As for `dense`.

        Returns:
            `(batch, rows of the matrix)`, float32, new: where asked for, the bits of `product`.
        """
        raise AssertionError(f"{self.name}: takes all rows")

    def wide(self, inputs: torch.Tensor, *, hold: bool = False) -> torch.Tensor:
        """Return `inputs @ matrix.T` computed in float32, for CPUs that emulate the weight's type.

        Panels of rows are widened and multiplied in turn.

        Args:
            inputs: `(batch, cols)` of the weight's dtype.
            hold: As for `dense`.

        Returns:
            `(batch, rows)`, float32, new.
        """
        rows, cols = self.shape
        x, matrix = inputs.float(), self.dense(hold=hold)
        out = torch.empty((inputs.shape[0], rows), dtype=torch.float32)
        step = panel_rows(cols)
        panel = torch.empty(min(step, rows), cols, dtype=torch.float32)
        for at in range(0, rows, step):
            wide = panel[: min(step, rows - at)].copy_(matrix[at : at + step])
            torch.mm(x, wide.T, out=out[:, at : at + len(wide)])
        return out

    @abstractmethod
    def close(self) -> None:
        """Let go of what refers to the mover's memory."""

    def __deepcopy__(self, memo: dict[int, Any]) -> "Weight":
        return self

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        refuse_pickle()

    def _covers_rows(self, part: Part, stored: TensorSpec) -> bool:
        return (
            stored.codec != "dense"
            and stored.dtype.name in PRODUCT_DTYPES
            and len(self.shape) == 2
            and stored.shape[-1:] == self.shape[1:]
            and len(stored.shape) == 2
            and part.stop - part.start == stored.numel
        )


class KeptWeight(Weight):
    """A weight that stays expanded once it was.

    Args:
        inner: Expands it.

    Attributes:
        kept: The dense matrix, once it was expanded.
    """

    def __init__(self, inner: Weight) -> None:
        super().__init__(inner.mover, inner.matrix)
        self._inner = inner
        self.kept: torch.Tensor | None = None

    def takes(self, spec: TensorSpec) -> bool:
        return False

    @property
    def device(self) -> torch.device:
        return self._inner.device

    def dense(self, *, hold: bool = False) -> torch.Tensor:
        if self.kept is None:
            self.kept = self._inner.fresh(hold=hold)
        return self.kept

    def fresh(self, *, hold: bool = False) -> torch.Tensor:
        return self._inner.fresh(hold=hold) if self.kept is None else self.kept.clone()

    def product(self, inputs: torch.Tensor, *, hold: bool = False) -> torch.Tensor:
        raise AssertionError(f"{self.name}: torch multiplies by what stays expanded")

    def close(self) -> None:
        self.kept = None
        self._inner.close()


def spec_of(part: Part, state: State) -> TensorSpec:
    """Return how the tensor of a part is stored."""
    return state.spec(part.tensor)


def panel_rows(cols: int) -> int:
    """Return how many rows of so many columns are widened at a time."""
    return max(1, PANEL // cols)


def refuse_pickle() -> NoReturn:
    """Raise `ConfigError`: packed weights belong to files that are open."""
    raise ConfigError(
        "packed weights are not pickled: save the model with save_pretrained and load that, or "
        "load the packed checkpoint in each process"
    )


def _retire(mover: Mover[Any]) -> None:
    """Close a mover whose store is gone.

    The garbage collector may call this on a thread that the mover waits for; only the main thread
    is surely none of those, so from any other the closing is left to a thread of its own.
    """
    if threading.current_thread() is threading.main_thread():
        mover.close()
    else:
        threading.Thread(target=mover.close, name="endor-retire", daemon=True).start()
