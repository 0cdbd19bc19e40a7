"""Packed units on a device: some live there, the others are copied into slots before their use."""

import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import torch

from endor.errors import BackendError
from endor.kernels import gpu_plan
from endor.offload.arena import PinnedArena
from endor.offload.copier import Copier, Slot
from endor.offload.device import Device, allocate_for_copies
from endor.offload.engine import Engine
from endor.offload.ledger import Ledger
from endor.offload.state import State
from endor.planning.tiers import Placement, Tier
from endor.planning.units import Unit
from endor.storage import HostBuffer, RecordReader, check_record


@dataclass(frozen=True, slots=True)
class Held:
    """A unit on the device, for the caller until it is given back.

    Attributes:
        unit: The unit.
        storage: Its record, u8, on the device.
        slot: Where it lies, unless it lives there.
        segments: `segment_nnz` of its tensors, where known.
    """

    unit: Unit
    storage: torch.Tensor
    slot: Slot | None
    segments: dict[str, int] = field(default_factory=dict)


class DeviceEngine:
    """Owns device memory, locked host memory and everything that moves bytes between them.

    Host residents and disk reads are an `Engine`'s, whose memory is page-locked. With a reader that
    reads into device memory (`cufile`), disk units go straight to the slots.

    Args:
        device: Where the units are used.
        units: All units, in execution order.
        placement: Their tiers; checked.
        reader: Reads records; closed with the engine.
        verify: Check each record whenever it is read into host memory.
        threads: Disk reads in flight.
        ledger: Where to count.
    """

    def __init__(
        self,
        device: Device,
        units: Sequence[Unit],
        placement: Placement,
        reader: RecordReader,
        *,
        verify: bool = True,
        threads: int = 2,
        ledger: Ledger | None = None,
    ) -> None:
        placement.check(units, on_device=True)
        self.device = device
        self.ledger = ledger or Ledger()
        self.units = tuple(units)
        self.placement = placement
        self._reader = reader
        self._verify = verify
        self._direct = bool(getattr(reader, "reads_device", False))
        self._home: dict[int, Held] = {}
        self._local = threading.local()
        self._load_home([unit for unit in units if placement.tiers[unit.name] == "vram"])
        slots = placement.slots if placement.outside(units) else 0
        slot_bytes = placement.slot_bytes(units)
        self.slot_bytes = slots * slot_bytes
        host_units, host_placement = _host_side(placement, units)
        if self._direct:
            self._check_direct(host_units, host_placement.tiers)
            host_units, host_placement = _residents_only(placement, units)
        self.host = Engine(
            host_units,
            host_placement,
            reader,
            verify=verify,
            threads=threads,
            ledger=self.ledger,
        )
        self.states = {unit.name: State(unit, unit.index in self._home) for unit in units}
        self._arena = PinnedArena(device, self.host.buffers)
        self._copier: Copier | None = None
        if slots:
            self._copier = Copier(
                device,
                _HostSource(self),
                [allocate_for_copies(device, slot_bytes) for _ in range(slots)],
                [
                    unit.index
                    for unit in placement.outside(units)
                    if unit.scheduled and placement.tiers[unit.name] != "vram-dense"
                ],
                workers=2 if self._direct else 1,
            )
        self._closed = False

    @property
    def streams(self) -> bool:
        """Whether any unit is copied for its use."""
        return self._copier is not None

    @property
    def staging_bytes(self) -> int:
        """Bytes of the host's staging area."""
        return self.host.staging_bytes

    @property
    def vram_bytes(self) -> int:
        """Device memory that packed units and slots take."""
        return sum(held.unit.nbytes for held in self._home.values()) + self.slot_bytes

    def take(self, state: State) -> Held:
        """Return a unit on the device; the caller's current stream waits for its copy.

        Give it back with `release` once everything that reads it was enqueued. Taking a unit gives
        back what the thread kept, unless it is the same.

        Raises:
            ReadError, FormatError: Its bytes did not come, or are damaged.
            BackendError: The engine is closed.
        """
        held = self._home.get(state.unit.index)
        if held is not None:
            return held
        kept: Held | None = getattr(self._local, "kept", None)
        if kept is not None:
            if kept.unit is state.unit:
                self._local.kept = None
                return kept
            self.drop()
        if self._copier is None:
            raise BackendError("the weights of this model were closed; load it again")
        slot = self._copier.take(state.unit.index)
        return Held(state.unit, slot.buffer, slot)

    def release(self, held: Held, *, hold: bool = False) -> None:
        """Give a unit back; work enqueued so far on the caller's current stream still uses it.

        Args:
            held: From `take`.
            hold: Keep it for this thread's next `take`, or until `drop`.
        """
        if held.slot is None:
            return
        if hold:
            self._local.kept = held
        elif self._copier is not None:  # else the engine was closed meanwhile
            self._copier.release(held.slot)

    def drop(self) -> None:
        """Give back what this thread kept, if anything."""
        kept: Held | None = getattr(self._local, "kept", None)
        if kept is not None:
            self._local.kept = None
            self.release(kept)

    def hint(self, states: Iterable[State], *, group: int = 0) -> None:
        """Ask for units that will be taken at once, in this order, as far as there are slots."""
        if self._copier is not None:
            states = list(states)
            self.host.hint(self._on_host(states), group=group)
            self._copier.hint(
                state.unit.index for state in states if state.unit.index not in self._home
            )

    def warm(self, states: Iterable[State]) -> None:
        """Read units from disk that the next `hint` may ask for; see `Engine.warm`."""
        self.host.warm(self._on_host(states))

    def _on_host(self, states: Iterable[State]) -> list[State]:
        found = (self.host.states.get(state.unit.name) for state in states)
        return [state for state in found if state is not None]

    def preload(self) -> None:
        """Wait until every host resident is in memory; errors as for `take`."""
        self.host.preload()

    def report(self) -> dict[str, Any]:
        """Return memory in use and what the copier did."""
        out: dict[str, Any] = {
            "vram_packed_bytes": self.vram_bytes - self.slot_bytes,
            "slot_bytes": self.slot_bytes,
            "slots": self._copier.slots if self._copier else 0,
            "pinned_bytes": self._arena.pinned_bytes,
            "pageable_bytes": self._arena.pageable_bytes,
            "pageable_reason": self._arena.reason,
        }
        if self._copier is not None:
            out["copier"] = asdict(self._copier.counters)
        return out

    def close(self) -> None:
        """Stop everything, in the order in which the memory is used; may be called twice."""
        if self._closed:
            return
        self._closed = True
        if self._copier is not None:
            self._copier.close()
        self.device.drain()
        self._arena.close()
        self.host.close()
        self._home.clear()
        self._local = threading.local()
        self._copier = None  # it refers to the slots, and through its source to this engine

    def _load_home(self, units: Sequence[Unit]) -> None:
        """Read the units that live on the device through two buffers, one being copied from."""
        if not units:
            return
        home = allocate_for_copies(self.device, sum(unit.nbytes for unit in units))
        largest = max(unit.nbytes for unit in units)
        buffers = [HostBuffer(largest) for _ in range(min(2, len(units)))]
        events = [self.device.event() for _ in buffers]
        at = 0
        with self.device.current():
            for turn, unit in enumerate(units):
                buffer, event = buffers[turn % 2], events[turn % 2]
                self.device.synchronize(event)
                data = buffer.array[: unit.nbytes]
                self._reader.read(unit.record, data)
                if self._verify:
                    check_record(unit.layout, unit.record.name, data)
                storage = home[at : at + unit.nbytes]
                self.device.copy(storage, data)
                self.device.record_copy(event)
                self._home[unit.index] = Held(unit, storage, None, _segments(unit, data))
                at += unit.nbytes
        for event in events:
            self.device.synchronize(event)

    def _check_direct(self, units: Sequence[Unit], tiers: Mapping[str, str]) -> None:
        """Look once at what will be read past the host, where nothing can check it."""
        chosen = [unit for unit in units if tiers[unit.name] == "disk"]
        if not self._verify or not chosen:
            return
        buffer = HostBuffer(max(unit.nbytes for unit in chosen))
        for unit in chosen:
            data = buffer.array[: unit.nbytes]
            self._reader.read(unit.record, data)
            check_record(unit.layout, unit.record.name, data)


class _HostSource:
    """Units from the host's engine, or from a reader that writes device memory."""

    def __init__(self, engine: DeviceEngine) -> None:
        self._engine = engine
        self._local = threading.local()

    def acquire(self, unit: int) -> np.ndarray:
        name = self._engine.units[unit].name
        host = self._engine.host
        state = host.states[name]
        if not state.resident:
            # Taking it gives back this thread's last one, whose copy may still read it.
            pending = getattr(self._local, "pending", None)
            if pending is not None:
                self._engine.device.synchronize(pending)
        host.take(state)
        assert state.place is not None
        return state.place.array

    def issued(self, unit: int, event: Any) -> None:
        if not self._engine.host.states[self._engine.units[unit].name].resident:
            self._local.pending = event

    def reads_directly(self, unit: int) -> bool:
        return self._engine.units[unit].name not in self._engine.host.states

    def read_into(self, unit: int, buffer: torch.Tensor) -> int:
        item = self._engine.units[unit]
        stat = self._engine._reader.read(item.record, buffer[: item.nbytes])  # type: ignore[arg-type]
        return stat.nbytes


def _residents_only(
    placement: Placement, units: Sequence[Unit]
) -> tuple[tuple[Unit, ...], Placement]:
    """The host's side when disk units never touch host memory."""
    tiers: dict[str, Tier] = dict.fromkeys(placement.tiers, "vram")
    tiers |= {name: tier for name, tier in placement.tiers.items() if tier == "resident"}
    return _host_side(Placement(tiers, 0, placement.slots), units)


def _host_side(placement: Placement, units: Sequence[Unit]) -> tuple[tuple[Unit, ...], Placement]:
    """Return the host's units, numbered anew, and their placement, as `Engine` takes them."""
    outside = tuple(replace(unit, index=at) for at, unit in enumerate(placement.outside(units)))
    tiers: dict[str, Tier] = {
        unit.name: "resident" if placement.tiers[unit.name] == "resident" else "disk"
        for unit in outside
    }
    return outside, Placement(tiers, placement.staging_bytes)


def _segments(unit: Unit, data: np.ndarray) -> dict[str, int]:
    """Return how full the products' segments are: known only while the bytes are on the host."""
    out = {}
    for name in unit.tensors:
        spec = unit.layout.tensors[name].spec
        if gpu_plan.product_refusal(spec) is None:
            bitmap = unit.layout.bind(name, data).arrays["bitmap"]
            out[name] = gpu_plan.segment_nnz(spec, bitmap)
    return out
