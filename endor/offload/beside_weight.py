"""Weights of a device's model that the host multiplies where they lie packed.

    device:  inputs -> down ...... product with the rows that are there ....... up -> result
    host:              arrived . product with the rows in RAM .

Few rows only: with more than `Weight.product_rows` a weight is copied and expanded like others.
"""

import time

import numpy as np
import torch

from endor import kernels
from endor.codecs import Encoded, TensorSpec
from endor.kernels import Prepared
from endor.offload.device_mover import DeviceMover
from endor.offload.device_weight import DeviceScratch, DeviceWeight, piece_of
from endor.offload.state import State
from endor.offload.weight import Matrix, spec_of
from endor.planning.units import Part


class BesideWeight(DeviceWeight):
    """A weight some of whose parts are multiplied on the host.

    Arguments as for `DeviceWeight`.
    """

    def __init__(
        self,
        mover: DeviceMover,
        matrix: Matrix,
        *,
        scratch: DeviceScratch,
    ) -> None:
        super().__init__(mover, matrix, scratch=scratch)
        tiers = mover.placement.tiers
        self._hosted = tuple(
            (part, state) for part, state in self.parts if tiers[state.unit.name] == "host"
        )
        self._elsewhere = tuple(pair for pair in self.parts if pair not in self._hosted)
        self._kernels = [Prepared(spec_of(part, state)) for part, state in self._hosted]

    def takes(self, spec: TensorSpec) -> bool:
        return True  # the host takes every packed matrix of whole rows

    def close(self) -> None:
        super().close()
        for kernel in self._kernels:
            kernel.forget()

    def product(self, inputs: torch.Tensor, *, hold: bool = False) -> torch.Tensor:
        mover, batch = self.mover, inputs.shape[0]
        out = torch.empty((batch, self.shape[0]), dtype=torch.float32, device=inputs.device)
        hosted = self._outside_vram(inputs, out)
        # What is damaged is found before anything is enqueued.
        bound = [mover.host.take(state)[part.tensor] for part, state, _ in hosted]
        if hosted:
            mover.exchange.send(inputs)
        for part, state in self._elsewhere:
            self._multiply(part, state, inputs, out, hold=hold)
        for part, state, _ in hosted:
            if mover.split.rows(state.unit, part.tensor):
                self._multiply_rows(part, state, inputs, out, hold=hold)
        operand = mover.exchange.arrived() if hosted else None
        for (part, state, kernel), encoded in zip(hosted, bound, strict=True):
            first = mover.split.rows(state.unit, part.tensor)
            if first < encoded.spec.shape[0]:
                assert operand is not None
                self._multiply_here(part, kernel, encoded, first, operand, out)
        mover.ledger.counters.products += 1
        mover.ledger.counters.packed_bytes += self.packed_nbytes
        return out

    def _outside_vram(
        self, inputs: torch.Tensor, out: torch.Tensor
    ) -> list[tuple[Part, State, Prepared]]:
        """Return the parts that the host multiplies; enqueue products with experts now in VRAM."""
        there = []
        for (part, state), kernel in zip(self._hosted, self._kernels, strict=True):
            held = self.mover.take_hot(state)
            if held is None:
                there.append((part, state, kernel))
                continue
            try:
                self._multiply_held(part, held, inputs, out)
            finally:
                self.mover.release(held)
        return there

    def _multiply_rows(
        self, part: Part, state: State, inputs: torch.Tensor, out: torch.Tensor, *, hold: bool
    ) -> None:
        """Enqueue the device's product with the rows of one part that the host leaves to it."""
        held = self.mover.take_rows(state)
        try:
            self._multiply_held(part, held, inputs, out)
        finally:
            self.mover.release(held, hold=hold)

    def _multiply_here(
        self,
        part: Part,
        kernel: Prepared,
        encoded: Encoded,
        first: int,
        operand: np.ndarray,
        out: torch.Tensor,
    ) -> None:
        """Multiply rows of one part on the host, and enqueue the copy of the result into `out`."""
        exchange, ledger = self.mover.exchange, self.mover.ledger
        batch, cols = out.shape[0], self.shape[1]
        rows = encoded.spec.shape[0] - first
        at = part.offset // cols + first
        nbytes = encoded.spec.nbytes * rows // encoded.spec.shape[0]
        result = exchange.result(batch, rows)
        start = time.perf_counter()
        multiply_rows(kernel, encoded, first, operand, result)
        stop = time.perf_counter()
        counters = ledger.counters
        counters.host_products += 1
        counters.host_bytes += nbytes
        counters.host_product_s += stop - start
        ledger.note("host product", self.name, start, stop, nbytes)
        piece = piece_of(out, at, rows)
        exchange.receive(piece, result)
        if piece is not out:
            out[:, at : at + rows] = piece


def multiply_rows(
    kernel: Prepared,
    encoded: Encoded,
    first: int,
    operand: np.ndarray,
    result: np.ndarray,
) -> None:
    """Write the product with the rows of a packed matrix from `first` on to `result`.

    Args:
        kernel: That of the matrix.
        encoded: The matrix.
        first: The first row.
        operand: The inputs' bytes: `(batch, cols)` of the matrix's type.
        result: float32 `(batch, rows)`.
    """
    if kernel.multiplies:
        x, out = operand.ctypes.data, result.ctypes.data
        kernel.matvec(encoded, x, result.shape[0], out, first=first)
        return
    bits = operand.view(encoded.spec.dtype.uint).reshape(result.shape[0], -1)
    whole = np.empty((result.shape[0], encoded.spec.shape[0]), dtype=np.float32)
    result[:] = kernels.matvec(encoded, bits, whole)[:, first:]
