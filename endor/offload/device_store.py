"""The weights of one model on a CUDA device: expanded on demand, or used packed."""

import threading
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from endor.codecs import DType, TensorSpec
from endor.kernels import gpu, gpu_plan
from endor.kernels.gpu import DeviceEncoded
from endor.offload.device import Device, Runnable
from endor.offload.device_engine import DeviceEngine, Held
from endor.offload.engine import Engine
from endor.offload.ledger import Ledger
from endor.offload.state import State
from endor.offload.store import Owner, Store, Weight, scratch_bytes
from endor.packed import torch_dtype
from endor.planning.products import Products
from endor.planning.tiers import Placement
from endor.planning.units import Part, Unit, WeightSpec, stored_dtype
from endor.storage import FileLayout, RecordReader


class DeviceScratch:
    """Two dense buffers per thread, used in turn, on the stream that the thread computes on.

    In one stream a buffer is free again when the next expansion into it runs. A thread that changes
    its stream makes the new one wait for the old.
    """

    def __init__(self, device: Device, nbytes: int) -> None:
        self.each = -(-nbytes // 256) * 256
        self.nbytes = 2 * self.each
        self._device = device
        self._local = threading.local()

    def next(self) -> torch.Tensor:
        """Return the other buffer, u8, `each` bytes."""
        local = self._local
        if not hasattr(local, "buffers"):
            both = self._device.allocate(self.nbytes)
            local.buffers = (both[: self.each], both[self.each :])
            local.turn, local.stream = 0, self._device.compute_stream()
            local.event = self._device.event()
        stream = self._device.compute_stream()
        if stream != local.stream:
            self._device.await_in_compute(local.event)
            local.stream = stream
        local.turn ^= 1
        buffer: torch.Tensor = local.buffers[local.turn]
        return buffer

    def expanded(self) -> None:
        """Note that an expansion was enqueued; uses of it come behind."""
        self._device.record_compute(self._local.event)


class DeviceStore(Store):
    """A `Store` whose weights are expanded and multiplied on a device.

    Args:
        layouts: The checkpoint's files.
        units: What moves; from `collect_units`.
        specs: What is multiplied by, and in which torch dtype.
        placement: Tier per unit.
        reader: Reads records; the store closes it.
        device: Where it computes.
        verify: Check each record whenever it is read into host memory.
        threads: Disk reads in flight.
        unpacked: Packed tensors that no layer can use packed: expanded when the model was loaded.
        ledger: Where to count; one of its own when omitted.
    """

    placement: Placement

    def __init__(
        self,
        layouts: Sequence[FileLayout],
        units: Sequence[Unit],
        specs: Iterable[tuple[WeightSpec, torch.dtype]],
        placement: Placement,
        reader: RecordReader,
        *,
        device: Device,
        verify: bool = True,
        threads: int = 2,
        unpacked: Sequence[str] = (),
        ledger: Ledger | None = None,
    ) -> None:
        self.unpacked = tuple(unpacked)
        self.layouts = tuple(layouts)
        self.units = tuple(units)
        self.device = device
        specs = list(specs)
        self.placement = placement
        self.reader = reader
        self.products = Products()
        self.device_scratch = DeviceScratch(device, scratch_bytes(layouts, specs))
        self.scratch = self.device_scratch  # type: ignore[assignment]
        self.device_engine = DeviceEngine(
            device, units, placement, reader, verify=verify, threads=threads, ledger=ledger
        )
        self.engine: Engine = self.device_engine  # type: ignore[assignment]
        self.owner = Owner(self.engine)
        states = self.device_engine.states
        home = {tensor: states[unit.name] for unit in units for tensor in unit.tensors}
        self.weights = {
            spec.name: DeviceWeight(
                self,
                at,
                spec,
                [home[part.tensor] for part in spec.parts],
                stored_dtype(layouts, spec),
                dtype,
            )
            for at, (spec, dtype) in enumerate(specs)
        }

    @property
    def ledger(self) -> Ledger:
        return self.device_engine.ledger

    @property
    def held_nbytes(self) -> int:
        """Bytes that packed records take: on the device, in RAM, slots and staging."""
        tiers = self.placement.tiers
        host = sum(unit.nbytes for unit in self.units if tiers[unit.name] == "resident")
        kept = sum(unit.dense_nbytes for unit in self.units if tiers[unit.name] == "vram-dense")
        return self.device_engine.vram_bytes + kept + host + self.device_engine.staging_bytes

    def close(self) -> None:
        """Stop reading and release the memory; using a weight afterwards is a BackendError."""
        super().close()
        for weight in self.weights.values():
            assert isinstance(weight, DeviceWeight)
            weight.forget()

    def report(self) -> dict[str, Any]:
        """Return where the units live, what the reader is, and the counters; all plain data."""
        return {
            "device": str(self.device.device),
            "tiers": self.count_tiers(),
            "unpacked_at_load": list(self.unpacked),
            "staging_bytes": self.device_engine.staging_bytes,
            "scratch_bytes": self.device_scratch.nbytes,
            "reader": self.reader.describe(),
            "counters": self.ledger.since(type(self.ledger.counters)()),
            **self.device_engine.report(),
        }


class DeviceWeight(Weight):
    """A dense matrix that exists in packed form and is used on a device."""

    __slots__ = ("_device_engine", "_device_scratch", "_expansions", "_groups")

    def __init__(
        self,
        store: DeviceStore,
        key: int,
        spec: WeightSpec,
        states: Sequence[State],
        item: DType,
        dtype: torch.dtype,
    ) -> None:
        self._device_engine = store.device_engine
        self._device_scratch = store.device_scratch
        self._expansions: dict[tuple[int, int, int], Runnable] = {}
        groups: dict[State, list[Part]] = {}
        for part, state in zip(spec.parts, states, strict=True):
            groups.setdefault(state, []).append(part)
        self._groups = tuple(groups.items())
        store_tiers = store.placement.tiers
        super().__init__(store, key, spec, states, item, dtype)
        self._keep = all(store_tiers[state.unit.name] == "vram-dense" for state in self.states)
        if self._keep:
            self.product_rows = 0

    def dense(self, *, hold: bool = False) -> torch.Tensor:
        """Return the matrix in scratch memory: valid until the thread's next but one expansion.

        Written and to be read on the caller's current stream.

        Args:
            hold: Keep its unit on the device for the thread's next weight; see `DeviceEngine`.
        """
        if self.kept is not None:
            return self.kept
        if self._keep:
            self.kept = self.fresh(hold=hold)
            return self.kept
        scratch = self._device_scratch
        buffer = scratch.next()
        nbytes = self.numel * self._item.itemsize
        matrix = buffer[:nbytes].view(torch_dtype(self._item)).view(self.shape)
        self._expand_into(matrix, cache=True, hold=hold)
        if self._convert:
            start = -(-nbytes // 64) * 64
            stop = start + self.numel * self.dtype.itemsize
            matrix = buffer[start:stop].view(self.dtype).view(self.shape).copy_(matrix)
        scratch.expanded()
        return matrix

    def fresh(self, *, hold: bool = False) -> torch.Tensor:
        """Return the matrix in memory of its own; `hold` as for `dense`."""
        if self.kept is not None:
            return self.kept.clone()
        matrix = torch.empty(self.shape, dtype=torch_dtype(self._item), device=self.device)
        self._expand_into(matrix, cache=False, hold=hold)
        return matrix.to(self.dtype)

    @property
    def device(self) -> torch.device:
        """Where the dense matrix is."""
        return self._device_engine.device.device

    def forget(self) -> None:
        """Let go of prepared expansions, which refer to the device's memory."""
        self._expansions.clear()

    @property
    def multiplies_packed(self) -> bool:
        """Whether `product` applies: rows of whole stored matrices that the kernel takes."""
        return super().multiplies_packed and all(
            gpu_plan.product_refusal(_spec(state, part)) is None for part, state in self._parts
        )

    def product(self, inputs: torch.Tensor, *, hold: bool = False) -> torch.Tensor:
        """Return `inputs @ matrix.T` from the packed form, in float32; see `Weight.product`."""
        out = torch.empty(
            (inputs.shape[0], self.shape[0]), dtype=torch.float32, device=inputs.device
        )
        engine, cols = self._device_engine, self.shape[1]
        for part, state in self._parts:
            held = engine.take(state)
            try:
                packed = _bind(held, part.tensor)
                if len(self._parts) == 1:
                    gpu.product(packed, inputs, out)
                else:
                    at = part.offset // cols
                    rows = packed.spec.shape[0]
                    piece = torch.empty(
                        (inputs.shape[0], rows), dtype=torch.float32, device=inputs.device
                    )
                    out[:, at : at + rows] = gpu.product(packed, inputs, piece)
            finally:
                engine.release(held, hold=hold)
        counters = self._device_engine.ledger.counters
        counters.products += 1
        counters.packed_bytes += self._packed_nbytes
        return out

    def _expand_into(self, matrix: torch.Tensor, *, cache: bool, hold: bool) -> None:
        """Enqueue the expansion of all parts; one launch per unit that holds any."""
        engine = self._device_engine
        for at, (state, parts) in enumerate(self._groups):
            held = engine.take(state)
            try:
                key = (at, held.storage.data_ptr(), matrix.data_ptr())
                expansion = self._expansions.get(key) if cache else None
                if expansion is None:
                    expansion, whole = self._prepared(held, parts, matrix.view(-1))
                    if cache and whole:
                        self._expansions[key] = expansion
                expansion.run()
            finally:
                engine.release(held, hold=hold)
        counters = self._device_engine.ledger.counters
        counters.expands += 1
        counters.packed_bytes += self._packed_nbytes
        counters.dense_bytes += matrix.numel() * matrix.element_size()

    def _prepared(
        self, held: Held, parts: Sequence[Part], flat: torch.Tensor
    ) -> tuple[Runnable, bool]:
        """Return the expansion of `parts`, and whether it may be kept.

        A part that is not a whole tensor, or lands at an address that kernels do not write to, is
        expanded beside and copied.
        """
        items: list[tuple[DeviceEncoded, torch.Tensor]] = []
        copies: list[tuple[torch.Tensor, torch.Tensor]] = []
        for part in parts:
            packed = _bind(held, part.tensor)
            out = flat[part.offset : part.offset + part.stop - part.start]
            if out.numel() == packed.spec.numel and out.data_ptr() % 16 == 0:
                items.append((packed, out.view(packed.spec.shape)))
                continue
            beside = torch.empty(packed.spec.shape, dtype=flat.dtype, device=flat.device)
            items.append((packed, beside))
            copies.append((out, beside.view(-1)[part.start : part.stop]))
        prepared = self._device_engine.device.prepare(items)
        return (_Copying(prepared, copies), False) if copies else (prepared, True)


class _Copying:
    """An expansion beside the destination, then copies of the ranges that are wanted."""

    def __init__(
        self, inner: Runnable, copies: Sequence[tuple[torch.Tensor, torch.Tensor]]
    ) -> None:
        self._inner = inner
        self._copies = copies

    def run(self) -> None:
        self._inner.run()
        for out, wanted in self._copies:
            out.copy_(wanted)


def _spec(state: State, part: Part) -> TensorSpec:
    return state.unit.layout.tensors[part.tensor].spec


def _bind(held: Held, tensor: str) -> DeviceEncoded:
    """Return a stored tensor as views of its unit's record on the device."""
    entry = held.unit.layout.tensors[tensor]
    offsets = {array.suffix: array.start for array in entry.arrays}
    segment = held.segments.get(tensor, gpu_plan.SEGMENT)
    return DeviceEncoded(entry.spec, held.storage, offsets, segment)
