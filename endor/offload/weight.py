"""A dense matrix that exists in packed form, ready to multiply by."""

import threading
import weakref
from typing import Any, NoReturn

import torch

from endor.errors import ConfigError
from endor.offload.expansion import Expansion
from endor.offload.host_expansion import panel_rows
from endor.offload.mover import Mover
from endor.offload.state import State
from endor.planning.products import NEVER, PRODUCT_ROWS, Products


class Owner:
    """What a store and its weights share: when the last of them is gone, the mover is closed.

    Weights do not refer to their store, for that would be a cycle: `del model` would then leave
    the packed weights in memory until the garbage collector comes by.
    """

    def __init__(self, mover: Mover[Any]) -> None:
        weakref.finalize(self, _retire, mover).atexit = False


class Weight:
    """A dense matrix that exists in packed form.

    Args:
        expansion: Its packed parts, and the kernels of the processor that multiplies by it.
        owner: Keeps its mover open.
        keep: Whether the matrix stays expanded once it was.
        products: How weights are multiplied by layers that need not be exact.

    Attributes:
        name: Its name in the model.
        mover: Brings its units.
        states: State of each of its units.
        shape: Dense shape.
        dtype: Element type that callers see.
        kept: The dense matrix itself, where it stays expanded, once it was.
        product_rows: Input rows up to which `product` is to be used; 0 where it cannot be.
        wide_rows: Input rows from which `wide` is to be used.
    """

    __slots__ = (
        "_expansion",
        "_owner",
        "dtype",
        "keeps_dense",
        "kept",
        "mover",
        "name",
        "numel",
        "product_rows",
        "shape",
        "states",
        "wide_rows",
    )

    def __init__(
        self, expansion: Expansion, owner: Owner, *, keep: bool, products: Products
    ) -> None:
        self._expansion = expansion
        self._owner = owner
        self.name = expansion.name
        self.mover = expansion.mover
        self.states: tuple[State, ...] = expansion.states
        self.shape = expansion.shape
        self.numel = expansion.numel
        self.dtype = expansion.dtype
        self.kept: torch.Tensor | None = None
        self.keeps_dense = keep
        self.product_rows = 0
        if self.multiplies_packed:
            self.product_rows = min(
                products.packed_rows.get(state.unit.name, PRODUCT_ROWS) for state in self.states
            )
        self.wide_rows = products.wide_rows if self.dtype.itemsize == 2 else NEVER

    def close(self) -> None:
        """Let go of what refers to the mover's memory."""
        self.kept = None
        self._expansion.forget()

    @property
    def device(self) -> torch.device:
        """Where the dense matrix is."""
        return self._expansion.device

    @property
    def multiplies_packed(self) -> bool:
        """Whether `product` applies: rows of whole stored matrices, in a type the kernels take."""
        return not self.keeps_dense and self.kept is None and self._expansion.multiplies

    def dense(self, *, hold: bool = False) -> torch.Tensor:
        """Return the matrix in this thread's scratch: valid until its next weight is expanded.

        Args:
            hold: Keep its unit for the thread's next weight, which is in the same one; the caller
                sees to `Mover.drop`.
        """
        if self.kept is not None:
            return self.kept
        if self.keeps_dense:
            self.kept = self.fresh(hold=hold)
            return self.kept
        return self._expansion.scratch(hold=hold)

    def fresh(self, *, hold: bool = False) -> torch.Tensor:
        """Return the matrix in memory of its own; `hold` as for `dense`."""
        if self.kept is not None:
            return self.kept.clone()
        return self._expansion.fresh(hold=hold)

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
        return self._expansion.product(inputs, hold=hold)

    def wide(self, inputs: torch.Tensor, *, hold: bool = False) -> torch.Tensor:
        """Return `inputs @ matrix.T` computed in float32, for CPUs that emulate the weight's type.

        Panels of rows are expanded, widened and multiplied in turn.

        Args:
            inputs: `(batch, cols)` of the weight's dtype.
            hold: As for `dense`.

        Returns:
            `(batch, rows)`, float32, new.
        """
        if self.multiplies_packed and not self._expansion.turned:
            return self._expansion.panels(inputs, hold=hold)
        rows, cols = self.shape
        x, matrix = inputs.float(), self.dense(hold=hold)
        out = torch.empty((inputs.shape[0], rows), dtype=torch.float32)
        step = panel_rows(cols)
        panel = torch.empty(min(step, rows), cols, dtype=torch.float32)
        for at in range(0, rows, step):
            wide = panel[: min(step, rows - at)].copy_(matrix[at : at + step])
            torch.mm(x, wide.T, out=out[:, at : at + len(wide)])
        return out

    def __deepcopy__(self, memo: dict[int, Any]) -> "Weight":
        return self

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        refuse_pickle()


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
