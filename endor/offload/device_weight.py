"""Weights on a device: expanded into scratch memory there, or multiplied where they lie packed."""

import threading
from collections.abc import Sequence

import torch

from endor.codecs import TensorSpec
from endor.dtypes import torch_dtype
from endor.errors import BackendError
from endor.kernels import gpu, gpu_product
from endor.kernels.gpu import DeviceEncoded
from endor.offload.device import Device, Product, Runnable
from endor.offload.device_mover import DeviceMover
from endor.offload.on_device import OnDevice
from endor.offload.state import State
from endor.offload.tuning import Tuner
from endor.offload.weight import Matrix, Weight
from endor.planning.scratch import align_view
from endor.planning.units import Part


class DeviceScratch:
    """Two dense buffers per thread, used in turn, on the stream that the thread computes on.

    In one stream a buffer is free again when the next expansion into it runs. A thread that changes
    its stream makes the new one wait for the old. A stream that is captured into a CUDA graph can
    wait for nothing outside: whoever captures and replays orders that against other work with the
    same thread's weights, as for any memory that a graph writes.

    Attributes:
        tuner: Which products are faster from the packed form than with what was expanded here.
    """

    def __init__(self, device: Device, nbytes: int) -> None:
        self.each = -(-nbytes // 256) * 256
        self.nbytes = 2 * self.each
        self.tuner = Tuner(device)
        self._device = device
        self._local = threading.local()

    def next(self) -> torch.Tensor:
        """Return the other buffer, u8, `each` bytes."""
        local, capturing = self._local, self._device.capturing()
        if not hasattr(local, "buffers"):
            if capturing:
                raise BackendError(
                    "this thread expands its first weight while its stream is captured into a CUDA "
                    "graph, which takes no memory: run the step once before it is captured"
                )
            both = self._device.allocate(self.nbytes)
            local.buffers = (both[: self.each], both[self.each :])
            local.turn, local.stream = 0, self._device.compute_stream()
            local.event = self._device.event()
        stream = self._device.compute_stream()
        if stream != local.stream and not capturing:
            self._device.await_in_compute(local.event)
            local.stream = stream
        local.turn ^= 1
        buffer: torch.Tensor = local.buffers[local.turn]
        return buffer

    def expanded(self) -> None:
        """Note that an expansion was enqueued; uses of it come behind."""
        if not self._device.capturing():
            self._device.record_compute(self._local.event)


class DeviceWeight(Weight):
    """A weight whose parts are records on a device.

    What is returned was written, and is to be read, on the caller's current stream.

    Args:
        mover: Brings its units onto the device.
        scratch: Shared by all weights on the device.

    The others are those of `Weight`.
    """

    mover: DeviceMover

    def __init__(
        self,
        mover: DeviceMover,
        matrix: Matrix,
        *,
        scratch: DeviceScratch,
    ) -> None:
        super().__init__(mover, matrix)
        self._scratch = scratch
        self._prepared: dict[tuple[int, int, int], Runnable] = {}
        self._ways: dict[tuple[int, int, bool], tuple[Product, Product]] = {}
        groups: dict[State, list[Part]] = {}
        for part, state in self.parts:
            groups.setdefault(state, []).append(part)
        self._groups = tuple(groups.items())

    @property
    def device(self) -> torch.device:
        return self.mover.device.device

    def takes(self, spec: TensorSpec) -> bool:
        return gpu_product.product_refusal(spec) is None

    def dense(self, *, hold: bool = False) -> torch.Tensor:
        """Return the matrix in scratch memory: valid until the thread's next but one expansion."""
        buffer = self._scratch.next()
        nbytes = self.numel * self.item.itemsize
        matrix = buffer[:nbytes].view(torch_dtype(self.item)).view(self.shape)
        self._expand(matrix, cache=True, hold=hold)
        if self.converts:
            start = align_view(nbytes)
            stop = start + self.numel * self.dtype.itemsize
            matrix = buffer[start:stop].view(self.dtype).view(self.shape).copy_(matrix)
        self._scratch.expanded()
        return matrix

    def fresh(self, *, hold: bool = False) -> torch.Tensor:
        matrix = torch.empty(self.shape, dtype=torch_dtype(self.item), device=self.device)
        self._expand(matrix, cache=False, hold=hold)
        return matrix.to(self.dtype)

    def close(self) -> None:
        self._prepared.clear()
        self._ways.clear()

    def product(self, inputs: torch.Tensor, *, hold: bool = False) -> torch.Tensor:
        out = torch.empty(
            (inputs.shape[0], self.shape[0]), dtype=torch.float32, device=inputs.device
        )
        for part, state in self.parts:
            self._multiply(part, state, inputs, out, hold=hold)
        counters = self.mover.ledger.counters
        counters.products += 1
        counters.packed_bytes += self.packed_nbytes
        return out

    def _multiply(
        self, part: Part, state: State, inputs: torch.Tensor, out: torch.Tensor, *, hold: bool
    ) -> None:
        """Enqueue the product with one part into its columns of `out`."""
        held = self.mover.take(state)
        try:
            self._multiply_held(part, held, inputs, out)
        finally:
            self.mover.release(held, hold=hold)

    def _multiply_held(
        self, part: Part, held: OnDevice, inputs: torch.Tensor, out: torch.Tensor
    ) -> None:
        """Enqueue the product with what is here of one part into its columns of `out`."""
        packed = held.bind(part.tensor)
        rows, at = packed.spec.shape[0], part.offset // self.shape[1]
        piece = piece_of(out, at, rows)
        self._way(part, held, packed, inputs, piece).run(inputs, piece)
        if piece is not out:
            out[:, at : at + rows] = piece

    def _way(
        self,
        part: Part,
        held: OnDevice,
        packed: DeviceEncoded,
        inputs: torch.Tensor,
        out: torch.Tensor,
    ) -> Product:
        """Return the faster way to multiply by one part: packed, or expanded into scratch."""
        key = part.offset, held.storage.data_ptr(), held.cut is not None
        ways = self._ways.get(key)
        if ways is None:
            device = self.mover.device
            expanded: Product = _Expanded(device, self._scratch, packed)
            made = expanded
            if gpu_product.product_refusal(packed.spec) is None:
                made = device.prepare_product(packed)
            ways = self._ways[key] = made, expanded
        first, second = ways
        prefers = first is second or self._scratch.tuner.prefers_packed(
            packed.spec,
            len(inputs),
            lambda: first.run(inputs, out),
            lambda: second.run(inputs, out),
        )
        return first if prefers else second

    def wide(self, inputs: torch.Tensor, *, hold: bool = False) -> torch.Tensor:
        raise BackendError(f"{self.name}: products in panels are for processors, not {self.device}")

    def _expand(self, matrix: torch.Tensor, *, cache: bool, hold: bool) -> None:
        """Enqueue the expansion of all parts; one launch per unit that holds any."""
        mover = self.mover
        for at, (state, parts) in enumerate(self._groups):
            held = mover.take(state)
            try:
                key = (at, held.storage.data_ptr(), matrix.data_ptr())
                expansion = self._prepared.get(key) if cache else None
                if expansion is None:
                    expansion, whole = self._prepare(held, parts, matrix.view(-1))
                    if cache and whole:
                        self._prepared[key] = expansion
                expansion.run()
            finally:
                mover.release(held, hold=hold)
        counters = mover.ledger.counters
        counters.expands += 1
        counters.packed_bytes += self.packed_nbytes
        counters.dense_bytes += matrix.numel() * matrix.element_size()

    def _prepare(
        self, held: OnDevice, parts: Sequence[Part], flat: torch.Tensor
    ) -> tuple[Runnable, bool]:
        """Return the expansion of `parts`, and whether it may be kept.

        A part that is not a whole tensor, or lands at an address that kernels do not write to, is
        expanded beside and copied.
        """
        items: list[tuple[DeviceEncoded, torch.Tensor]] = []
        copies: list[tuple[torch.Tensor, torch.Tensor | _Turned]] = []
        for part in parts:
            packed = held.bind(part.tensor)
            out = flat[part.offset : part.offset + part.stop - part.start]
            if packed.spec.transposed:
                packed = gpu.as_stored(packed)
                turned = torch.empty(packed.spec.shape, dtype=flat.dtype, device=flat.device)
                items.append((packed, turned))
                copies.append((out, _Turned(turned, part.start, part.stop)))
                continue
            if out.numel() == packed.spec.numel and out.data_ptr() % 16 == 0:
                items.append((packed, out.view(packed.spec.shape)))
                continue
            beside = torch.empty(packed.spec.shape, dtype=flat.dtype, device=flat.device)
            items.append((packed, beside))
            copies.append((out, beside.view(-1)[part.start : part.stop]))
        prepared = self.mover.device.prepare(items)
        return (_Copying(prepared, copies), False) if copies else (prepared, True)


class _Expanded:
    """A product with a tensor that is expanded into scratch memory first, each time."""

    def __init__(self, device: Device, scratch: DeviceScratch, packed: DeviceEncoded) -> None:
        self._device, self._scratch = device, scratch
        self._packed, self._turned = gpu.as_stored(packed), packed.spec.transposed
        self._dtype = torch_dtype(packed.spec.dtype)
        self._prepared: dict[int, Runnable] = {}

    def run(self, x: torch.Tensor, out: torch.Tensor) -> None:
        spec = self._packed.spec
        buffer = self._scratch.next()[: spec.dense_nbytes]
        matrix = buffer.view(self._dtype).view(spec.shape)
        expansion = self._prepared.get(matrix.data_ptr())
        if expansion is None:
            expansion = self._device.prepare([(self._packed, matrix)])
            self._prepared[matrix.data_ptr()] = expansion
        expansion.run()
        self._scratch.expanded()
        out.copy_(x @ matrix if self._turned else torch.nn.functional.linear(x, matrix))


class _Copying:
    """An expansion beside the destination, then copies of the ranges that are wanted."""

    def __init__(
        self, inner: Runnable, copies: Sequence[tuple[torch.Tensor, "torch.Tensor | _Turned"]]
    ) -> None:
        self._inner = inner
        self._copies = copies

    def run(self) -> None:
        self._inner.run()
        for out, wanted in self._copies:
            if isinstance(wanted, _Turned):
                wanted.copy_to(out)
            else:
                out.copy_(wanted)


class _Turned:
    """A flat range of a matrix whose transposed one was expanded."""

    def __init__(self, matrix: torch.Tensor, start: int, stop: int) -> None:
        self._matrix, self._range = matrix, slice(start, stop)

    def copy_to(self, out: torch.Tensor) -> None:
        """Write the range to `out`, flat."""
        matrix = self._matrix.T
        if out.numel() == matrix.numel():
            out.view(matrix.shape).copy_(matrix)
        else:
            out.copy_(matrix.reshape(-1)[self._range])


def piece_of(out: torch.Tensor, at: int, rows: int) -> torch.Tensor:
    """Return memory for columns `[at, at + rows)` of `out`: those of `out` where they are all."""
    if at == 0 and rows == out.shape[1]:
        return out
    return torch.empty((out.shape[0], rows), dtype=out.dtype, device=out.device)
