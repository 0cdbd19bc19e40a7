"""Weights on the processor: expanded into scratch memory, or multiplied where they lie packed."""

import threading
import time
from collections.abc import Callable
from typing import TypeVar

import numpy as np
import torch

from endor import kernels
from endor.dtypes import torch_dtype
from endor.kernels import Prepared, chosen, select, thread_count
from endor.offload.mover import Mover
from endor.offload.state import Bound, State
from endor.offload.weight import Matrix, Weight, panel_rows, spec_of
from endor.packed import bits_of, tensor_of
from endor.planning.scratch import align_view
from endor.planning.units import Part

T = TypeVar("T")

_CPU = torch.device("cpu")


class Scratch:
    """A dense buffer per thread, reused for every weight that the thread multiplies by.

    One buffer is enough where expansion and product run in turn, as on the CPU; on a device two
    alternate. Threads do not share it, so that two of them may run one model.
    """

    __slots__ = ("_local", "nbytes")

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self._local = threading.local()

    def view(self, key: int, make: Callable[[torch.Tensor], T]) -> T:
        """Return `make(buffer)`, remembered per thread and `key`.

        Args:
            key: Names the view.
            make: Gets the thread's buffer, u8 of `nbytes`, and returns views of it.
        """
        local = self._local
        try:
            found: T = local.views[key]
            return found
        except AttributeError:
            local.views = {}
            local.buffer = torch.empty(self.nbytes, dtype=torch.uint8)
        except KeyError:
            pass
        view = make(local.buffer)
        local.views[key] = view
        return view


class HostWeight(Weight):
    """A weight whose parts are arrays in host memory.

    Args:
        mover: Brings its units into host memory.
        scratch: Shared by all weights of the model.
        key: Names this weight there.

    The others are those of `Weight`.
    """

    def __init__(
        self,
        mover: Mover[Bound],
        matrix: Matrix,
        *,
        scratch: Scratch,
        key: int,
    ) -> None:
        super().__init__(mover, matrix)
        self._scratch = scratch
        self._key = key
        self._pieces = tuple(
            (part, state, Prepared(spec_of(part, state))) for part, state in self.parts
        )
        specs = [kernel.spec for _, _, kernel in self._pieces]
        self.takes_rows = self.multiplies and len(specs) == 1 and chosen.takes_rows(specs[0])

    @property
    def device(self) -> torch.device:
        return _CPU

    def dense(self, *, hold: bool = False) -> torch.Tensor:
        flat, matrix, converted = self._scratch.view(self._key, self._views)
        self._expand(flat, hold)
        return matrix if converted is None else converted.copy_(matrix)

    def fresh(self, *, hold: bool = False) -> torch.Tensor:
        matrix = torch.empty(self.shape, dtype=torch_dtype(self.item))
        self._expand(bits_of(matrix).reshape(-1), hold)
        return matrix.to(self.dtype)

    def close(self) -> None:
        for _, _, kernel in self._pieces:
            kernel.forget()

    def product(self, inputs: torch.Tensor, *, hold: bool = False) -> torch.Tensor:
        out = torch.empty((inputs.shape[0], self.shape[0]), dtype=torch.float32)
        start = time.perf_counter()
        if len(self._pieces) == 1:
            self._multiply(*self._pieces[0], inputs, out, hold)
        else:
            for part, state, kernel in self._pieces:
                rows, at = kernel.spec.shape[0], part.offset // self.shape[1]
                piece = out.new_empty(len(out), rows)
                self._multiply(part, state, kernel, inputs, piece, hold)
                out[:, at : at + rows] = piece
        self.mover.ledger.note_product(self.name, start, self.packed_nbytes)
        return out

    def product_of(
        self, inputs: torch.Tensor, rows: np.ndarray, *, hold: bool = False
    ) -> torch.Tensor:
        out = torch.zeros((inputs.shape[0], self.shape[0]), dtype=torch.float32)
        start = time.perf_counter()
        part, state, _ = self._pieces[0]
        bound = self.mover.take(state) if state.fixed is None else state.fixed
        try:
            x = bits_of(inputs)
            chosen.product(bound[part.tensor], x, rows, out.numpy(), thread_count(), select())
        finally:
            if state.fixed is None:
                self.mover.release(bound, hold=hold)
        ledger = self.mover.ledger
        ledger.note_product(
            self.name, start, self.packed_nbytes * rows.size // max(1, self.shape[0])
        )
        ledger.counters.rows += self.shape[0]
        ledger.counters.chosen_rows += rows.size
        return out

    def wide(self, inputs: torch.Tensor, *, hold: bool = False) -> torch.Tensor:
        if not self.multiplies or self.turned:
            return super().wide(inputs, hold=hold)
        rows, cols = self.shape
        x = inputs.float()
        out = torch.empty((inputs.shape[0], rows), dtype=torch.float32)
        step = panel_rows(cols)
        panel = torch.empty(min(step, rows), cols, dtype=torch.float32)
        narrow = torch.empty(panel.shape, dtype=self.dtype)
        flat = bits_of(narrow).reshape(-1)
        began, spent = time.perf_counter(), 0.0
        for part, state, kernel in self._pieces:
            fixed, mover = state.fixed, self.mover
            bound = mover.take(state) if fixed is None else fixed
            try:
                for first in range(part.start, part.stop, step * cols):
                    start = time.perf_counter()
                    last = min(first + step * cols, part.stop)
                    kernel.decode(bound[part.tensor], flat, start=first, stop=last)
                    spent += time.perf_counter() - start
                    count = (last - first) // cols
                    at = (part.offset + first - part.start) // cols
                    wide = panel[:count].copy_(narrow[:count])
                    torch.mm(x, wide.T, out=out[:, at : at + count])
            finally:
                if fixed is None:
                    mover.release(bound, hold=hold)
        self._count_expansion(began, began + spent, self.numel * self.item.itemsize)
        return out

    def _multiply(
        self,
        part: Part,
        state: State,
        kernel: Prepared,
        inputs: torch.Tensor,
        out: torch.Tensor,
        hold: bool,
    ) -> None:
        """Write the product with one part to `out`, float32 `(batch, rows)`, contiguous."""
        fixed = state.fixed
        bound = self.mover.take(state) if fixed is None else fixed
        try:
            if kernel.multiplies:
                x, batch = inputs.data_ptr(), inputs.shape[0]
                kernel.matvec(bound[part.tensor], x, batch, out.data_ptr())
            else:
                kernels.matvec(bound[part.tensor], bits_of(inputs), out.numpy())
        finally:
            if fixed is None:
                self.mover.release(bound, hold=hold)

    def _expand(self, flat: np.ndarray, hold: bool) -> None:
        start = time.perf_counter()
        for part, state, kernel in self._pieces:
            out = flat[part.offset : part.offset + part.stop - part.start]
            fixed = state.fixed
            bound = self.mover.take(state) if fixed is None else fixed
            try:
                kernel.decode(bound[part.tensor], out, start=part.start, stop=part.stop)
            finally:
                if fixed is None:
                    self.mover.release(bound, hold=hold)
        self._count_expansion(start, time.perf_counter(), flat.nbytes)

    def _count_expansion(self, start: float, stop: float, dense_nbytes: int) -> None:
        ledger = self.mover.ledger
        counters = ledger.counters
        counters.expands += 1
        counters.packed_bytes += self.packed_nbytes
        counters.dense_bytes += dense_nbytes
        counters.expand_s += stop - start
        ledger.note("expand", self.name, start, stop, self.packed_nbytes)

    def _views(self, buffer: torch.Tensor) -> tuple[np.ndarray, torch.Tensor, torch.Tensor | None]:
        nbytes = self.numel * self.item.itemsize
        flat = buffer[:nbytes].numpy().view(self.item.uint)
        matrix = tensor_of(flat, self.item).reshape(self.shape)
        if not self.converts:
            return flat, matrix, None
        start = align_view(nbytes)
        stop = start + self.numel * self.dtype.itemsize
        return flat, matrix, buffer[start:stop].view(self.dtype).reshape(self.shape)
