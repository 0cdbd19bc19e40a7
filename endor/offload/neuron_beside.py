"""A matrix that is stored by neuron, its busy neurons on a device and the others on the host.

    W2 · h  =  W2[:, busy] · h[busy]  +  W2[:, others] · h[others]
               on the device             on the host, only where h is not 0

PowerInfer's split (arXiv 2312.12456), and exact: which neurons are busy says where a product is
made, not whether. What the busy ones have is a matrix of its own on the device, packed by row as
other matrices there; the host has all of them, for many rows of input take the whole.
"""

import threading
import time
from collections.abc import Iterator

import numpy as np
import torch

from endor import kernels
from endor.codecs import Encoded, TensorSpec
from endor.kernels import gpu_product, neurons, select, thread_count
from endor.offload.device import allocate_for_copies
from endor.offload.device_mover import DeviceMover
from endor.offload.device_weight import DeviceScratch, DeviceWeight
from endor.offload.neuron_blocks import runs
from endor.offload.on_device import OnDevice
from endor.offload.row_split import Cut
from endor.offload.state import State
from endor.offload.weight import Matrix
from endor.storage.layout import ARRAY_ALIGN, align_up

_SLACK = 128
"""Bytes behind an array that kernels may read: whole registers."""

STEP = 32
"""Busy neurons are a multiple of so many: what products on devices take."""


class NeuronBesideWeight(DeviceWeight):
    """One matrix that is stored by neuron, in tier `host`.

    Few rows of input only: with more than `product_rows` the matrix is copied and expanded.

    Args:
        kept_bytes: Device memory for busy neurons.
        active_share: Of the tokens, in how many each neuron is active.

    The others are those of `DeviceWeight`.

    Attributes:
        hot_nbytes: Device memory that busy neurons take.
    """

    def __init__(
        self,
        mover: DeviceMover,
        matrix: Matrix,
        *,
        scratch: DeviceScratch,
        kept_bytes: int,
        active_share: np.ndarray,
    ) -> None:
        super().__init__(mover, matrix, scratch=scratch)
        self.hot_nbytes = 0
        self._kept_bytes = kept_bytes
        self._active_share = active_share
        self._lock = threading.Lock()
        self._made = False
        self._held: OnDevice | None = None
        self._index = torch.empty(0, dtype=torch.int64)
        self._cold = np.ones(self.shape[1], dtype=bool)

    def takes(self, spec: TensorSpec) -> bool:
        return True  # the host takes every packed matrix of whole rows

    def close(self) -> None:
        super().close()
        with self._lock:
            self._held, self._made, self.hot_nbytes = None, True, 0
            self._cold = np.ones(self.shape[1], dtype=bool)

    def preload(self) -> None:
        """Bring what busy neurons have to the device.

        Errors as for `product`, and `BackendError` where there is no memory.
        """
        (part, state), *_ = self.parts
        self._prepare_hot(state, self.mover.host.take(state)[part.tensor])

    def product(self, inputs: torch.Tensor, *, hold: bool = False) -> torch.Tensor:
        mover, exchange, batch = self.mover, self.mover.exchange, inputs.shape[0]
        ((part, state),) = self.parts
        encoded = mover.host.take(state)[part.tensor]
        held, index, cold = self._prepare_hot(state, encoded)
        exchange.send(inputs)
        out = torch.empty((batch, self.shape[0]), dtype=torch.float32, device=inputs.device)
        if held is None:
            out.zero_()
        else:
            self._multiply_held(part, held, inputs.index_select(1, index), out)
        x = exchange.arrived().view(encoded.spec.dtype.uint).reshape(batch, -1)
        active = neurons.active_neurons(x)
        here = active[cold[active]]
        ledger = mover.ledger
        counters = ledger.counters
        counters.products += 1
        counters.packed_bytes += self.packed_nbytes
        counters.neurons += self.shape[1]
        counters.active_neurons += active.size
        counters.device_neurons += active.size - here.size
        if here.size:  # or there is nothing to bring up
            result = exchange.result(batch, self.shape[0])
            start = time.perf_counter()
            neurons.product(encoded, x, here, result, thread_count(), select())
            stop = time.perf_counter()
            touched = self.packed_nbytes * here.size // self.shape[1]
            counters.host_products += 1
            counters.host_bytes += touched
            counters.host_product_s += stop - start
            ledger.note("host product", self.name, start, stop, touched)
            piece = torch.empty_like(out)
            exchange.receive(piece, result)
            out += piece
        return out

    def _prepare_hot(
        self, state: State, encoded: Encoded
    ) -> tuple[OnDevice | None, torch.Tensor, np.ndarray]:
        """Return what busy neurons have on the device, which these are, and which are not."""
        with self._lock:
            if not self._made:
                self._make(state, encoded)
                self._made = True
            return self._held, self._index, self._cold

    def _make(self, state: State, encoded: Encoded) -> None:
        found = busy_part(encoded, self._active_share, self._kept_bytes)
        if found is None:
            return
        chosen, packed = found
        device = self.mover.device
        data, offsets = flattened(packed)
        storage = allocate_for_copies(device, data.nbytes)
        event = device.event()
        with device.current():
            device.copy_up(storage, data)
        device.record_compute(event)
        device.synchronize(event)  # the source may go
        name = self.parts[0][0].tensor
        segments = {}
        if gpu_product.product_refusal(packed.spec) is None:
            nnz = gpu_product.segment_nnz(packed.spec, packed.arrays.get("bitmap"))
            segments[name] = nnz
        cut = Cut((), {name: (packed.spec, offsets)}, data.nbytes)
        self._held = OnDevice(state.unit, storage, None, segments, cut)
        self._index = torch.from_numpy(chosen.astype(np.int64)).to(device.device)
        self._cold[chosen] = False
        self.hot_nbytes = data.nbytes


def busy_part(
    encoded: Encoded, active_share: np.ndarray, nbytes: int
) -> tuple[np.ndarray, Encoded] | None:
    """Return the busiest neurons that fit, ascending, and the matrix of their columns, by row.

    Args:
        encoded: A matrix `(rows, neurons)` that is stored by neuron.
        active_share: Of the tokens, in how many each neuron is active.
        nbytes: Memory for them; None is returned where it holds not even a few.
    """
    spec = encoded.spec
    order = np.argsort(-active_share, kind="stable")[: int(np.count_nonzero(active_share))]
    count = min(len(order), nbytes * spec.shape[1] // max(1, spec.nbytes)) // STEP * STEP
    best, grown = None, False
    while count > 0:
        chosen = np.sort(order[:count])
        bits = np.ascontiguousarray(columns(encoded, chosen))
        assert spec.codec in ("raw", "exp")
        packed = kernels.encode(bits, spec.dtype, codec=spec.codec)
        taken = flattened_nbytes(packed)
        if taken <= nbytes:
            best = chosen, packed
            more = min(len(order), int(0.99 * count * nbytes / taken)) // STEP * STEP
            if grown or more <= count:
                break
            count, grown = more, True  # by row they take less than by neuron
        elif best is not None:
            break
        else:
            count = min(count - STEP, count * nbytes // taken) // STEP * STEP
    return best


def columns(encoded: Encoded, chosen: np.ndarray) -> np.ndarray:
    """Return columns of a matrix that is stored by neuron, unsigned `(rows, chosen)`."""
    spec, rows = encoded.spec, encoded.spec.shape[0]
    stored = Encoded(spec.stored, encoded.arrays)
    wanted = np.zeros(spec.shape[1], dtype=bool)
    wanted[chosen] = True
    out = np.empty((len(chosen), rows), dtype=spec.dtype.uint)
    at = 0
    for first, last in runs(wanted):
        piece = out[at : at + last - first].reshape(-1)
        kernels.decode(stored, piece, start=first * rows, stop=last * rows)
        at += last - first
    return out.T


def _places(packed: Encoded) -> Iterator[tuple[str, int, np.ndarray]]:
    at = 0
    for suffix, array in packed.arrays.items():
        yield suffix, at, array
        at = align_up(at + array.nbytes + _SLACK, ARRAY_ALIGN)
    yield "end", at, np.empty(0, np.uint8)


def flattened_nbytes(packed: Encoded) -> int:
    """Return the bytes of what `flattened` returns."""
    return [at for _, at, _ in _places(packed)][-1]


def flattened(packed: Encoded) -> tuple[np.ndarray, dict[str, int]]:
    """Return the arrays of a stored tensor in one, u8, and where each begins."""
    *places, (_, end, _) = _places(packed)
    data = np.zeros(end, dtype=np.uint8)
    for _, at, array in places:
        data[at : at + array.nbytes] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    return data, {suffix: at for suffix, at, _ in places}
