"""Packed units on a device: some live there, the others are copied into slots before their use."""

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from endor.errors import BackendError
from endor.offload.copier import Copier
from endor.offload.device import Device, allocate_for_copies
from endor.offload.exchange import Exchange
from endor.offload.host_mover import HostMover
from endor.offload.host_source import HostSource
from endor.offload.hot_experts import HotExperts
from endor.offload.ledger import Ledger
from endor.offload.on_device import OnDevice, segments_of
from endor.offload.pinned import PinnedArena
from endor.offload.row_split import Cut, RowSplit
from endor.offload.schedule import Schedule
from endor.offload.state import State, States
from endor.planning.tiers import PACKED_IN_RAM, Placement
from endor.planning.units import Unit
from endor.storage import HostBuffer, RecordReader, check_record


class DeviceMover:
    """A `Mover` onto a device: some units live there, the others come through host memory.

    Host residents and disk reads are a `HostMover`'s, whose memory is page-locked. With a reader
    that reads into device memory (`cufile`), disk units go straight to the slots.

    Args:
        device: Where the units are used.
        units: All units, in execution order.
        placement: Their tiers; checked.
        reader: Reads records; closed with the mover.
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
        pool, moving = placement.pool(units), placement.moving(units)
        self.placement = placement = placement.as_used(units)
        self._reader = reader
        self._verify = verify
        self._direct = bool(getattr(reader, "reads_device", False))
        self._lives_here: dict[int, OnDevice] = {}
        self._local = threading.local()
        self._load_packed([unit for unit in units if placement.tiers[unit.name] == "vram"])
        slots = placement.slots if placement.outside(units) else 0
        slot_bytes = placement.slot_bytes(units)
        self.slot_bytes = slots * slot_bytes
        passing = [unit for unit in units if placement.tiers[unit.name] != "vram"]
        if self._direct:
            self._check_direct([u for u in passing if placement.tiers[u.name] not in PACKED_IN_RAM])
            passing = [unit for unit in passing if placement.tiers[unit.name] in PACKED_IN_RAM]
        self.split = RowSplit(units, placement)
        schedule = Schedule(self._ahead(unit for unit in units if unit.scheduled))
        self.host = HostMover(
            passing,
            placement,
            reader,
            verify=verify,
            threads=threads,
            ledger=self.ledger,
            schedule=schedule.follower(),
            on_device=True,
        )
        self.states: Mapping[str, State] = {
            unit.name: self.host.states.get(unit.name) or State(unit, resident=False)
            for unit in units
        }
        self._arena = PinnedArena(device, self.host.buffers)
        self.exchange = Exchange(device)
        self.hot: HotExperts | None = None
        if moving:
            assert placement.exchanges is not None
            self.hot = HotExperts(
                device,
                [self.states[unit.name] for unit in pool],
                moving,
                placement.exchanges,
                self.ledger,
            )
        self._copier: Copier | None = None
        if slots:
            self._copier = Copier(
                device,
                HostSource(device, units, self.host, self.split, reader, placement),
                [allocate_for_copies(device, slot_bytes) for _ in range(slots)],
                schedule,
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
    def held_nbytes(self) -> int:
        """Bytes that packed units take: on the device, in slots, in RAM and staging."""
        return self.vram_bytes + self.host.held_nbytes

    @property
    def vram_bytes(self) -> int:
        """Device memory that packed units and slots take."""
        stays = sum(held.unit.nbytes for held in self._lives_here.values())
        return stays + self.slot_bytes + (self.hot.nbytes if self.hot else 0)

    def take(self, state: State) -> OnDevice:
        """Return a unit on the device; the caller's current stream waits for its copy.

        See `Mover.take`.
        """
        held = self._lives_here.get(state.unit.index) or self.take_hot(state)
        return held or self._take(state.unit, None)

    def take_hot(self, state: State) -> OnDevice | None:
        """Return an expert if it is one of those in VRAM now, to be given back as any other."""
        if self.hot is None:
            return None
        if self.device.capturing():
            raise BackendError(
                f"{state.unit.name} may leave VRAM: what experts that change places are multiplied "
                "by cannot be captured into a CUDA graph; give all of them VRAM"
            )
        return self.hot.take(state.unit.index)

    def take_rows(self, state: State) -> OnDevice:
        """Return those rows of a unit that the host does not multiply; as `take` otherwise."""
        return self._take(state.unit, self.split.cut(state.unit, self.host.take(state)))

    def _take(self, unit: Unit, cut: Cut | None) -> OnDevice:
        kept: OnDevice | None = getattr(self._local, "kept", None)
        if kept is not None:
            if kept.unit is unit and kept.cut is cut:
                self._local.kept = None
                return kept
            self.drop()
        if self._copier is None:
            raise BackendError("the weights of this model were closed; load it again")
        if self.device.capturing():
            raise BackendError(
                f"{unit.name} is not in VRAM: its copies cannot be captured into a CUDA graph; "
                "capture models whose units are all there (a larger vram budget)"
            )
        slot = self._copier.take(unit.index if cut is None else self.split.number(unit))
        return OnDevice(unit, slot.buffer, slot, cut=cut)

    def _ahead(self, units: Iterable[Unit]) -> list[int]:
        """Return what the copier calls units that it may copy before few rows are multiplied.

        What the host multiplies whole is copied on demand: for many rows alone, and these wait for
        nothing, since their copies are enqueued long before they run.
        """
        tiers, out = self.placement.tiers, []
        for unit in units:
            if unit in self.split:
                out.append(self.split.number(unit))
            elif tiers[unit.name] not in ("vram", "host"):
                out.append(unit.index)
        return out

    def release(self, held: OnDevice, *, hold: bool = False) -> None:
        """Give a unit back; work enqueued so far on the caller's current stream still uses it."""
        if held.home is not None:
            assert self.hot is not None
            self.hot.release(held.home)
        elif held.slot is None:
            return
        elif hold:
            self._local.kept = held
        elif self._copier is not None:  # else the mover was closed meanwhile
            self._copier.release(held.slot)

    def drop(self) -> None:
        """Give back what this thread kept, if anything."""
        kept: OnDevice | None = getattr(self._local, "kept", None)
        if kept is not None:
            self._local.kept = None
            self.release(kept)

    def near(self, state: State) -> bool:
        """Whether a unit is in VRAM now, or in memory where others like it are read from disk."""
        index = state.unit.index
        if index in self._lives_here or (self.hot is not None and index in self.hot):
            return True
        return self.host.streams and not state.unit.scheduled and self.host.near(state)

    def hint(self, states: States, *, group: int = 0, wanted: States | None = None) -> None:
        """Ask for units that will be taken at once, in this order, as far as there are slots."""
        if self._copier is not None:
            states = list(states)
            chosen = states if wanted is None else list(wanted)
            self.host.hint(self._on_host(states), group=group, wanted=self._on_host(chosen))
            if self.hot is not None:
                self.hot.route(group, [state.unit.index for state in chosen])
                states = [state for state in states if state.unit.index not in self.hot]
            self._copier.hint(self._ahead(state.unit for state in states))

    def warm(self, states: Iterable[State]) -> None:
        """Read units from disk that the next `hint` may ask for, and copy them where nothing surer
        is to be copied; see `Mover.warm`.
        """
        states = list(states)
        self.host.warm(self._on_host(states))
        if self._copier is not None:
            there = self.hot or ()
            units = [s.unit for s in states if s.fixed is not None and s.unit.index not in there]
            self._copier.guess(self._ahead(units))

    def _on_host(self, states: Iterable[State]) -> list[State]:
        return [state for state in states if state.unit.name in self.host.states]

    def forget(self, states: Iterable[State]) -> None:
        """Copy units no more ahead of their use."""
        if self._copier is not None:
            self._copier.forget(state.unit.index for state in states)

    def post(self, priority: int, run: Callable[[], None]) -> None:
        """Have a task run on a thread that reads for the host; see `Mover.post`."""
        self.host.post(priority, run)

    def preload(self) -> None:
        """Wait until host residents and experts in VRAM are there; errors as for `take`."""
        self.host.preload()
        if self.hot is not None:
            self.hot.settle()

    def report(self) -> dict[str, Any]:
        """Return memory in use and what the copier did."""
        out: dict[str, Any] = {
            "device": str(self.device.device),
            "vram_packed_bytes": self.vram_bytes - self.slot_bytes,
            "slot_bytes": self.slot_bytes,
            "slots": self._copier.slots if self._copier else 0,
            "pinned_bytes": self._arena.pinned_bytes,
            "pageable_bytes": self._arena.pageable_bytes,
            "pageable_reason": self._arena.reason,
        }
        if self._copier is not None:
            out["copier"] = asdict(self._copier.counters)
        if self.hot is not None:
            out["hot_experts"] = self.hot.report()
        return out

    def close(self) -> None:
        """Stop everything, in the order in which the memory is used; may be called twice."""
        if self._closed:
            return
        self._closed = True
        if self.hot is not None:
            self.hot.close()
        if self._copier is not None:
            self._copier.close()
        self.device.drain()
        self.exchange.close()
        self._arena.close()
        self.host.close()
        self._lives_here.clear()
        self._local = threading.local()
        self._copier = None  # it refers to the slots, and through its source to this mover

    def _load_packed(self, units: Sequence[Unit]) -> None:
        """Read the units that live on the device through two buffers, one being copied from."""
        if not units:
            return
        memory = allocate_for_copies(self.device, sum(unit.nbytes for unit in units))
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
                storage = memory[at : at + unit.nbytes]
                self.device.copy(storage, data)
                self.device.record_copy(event)
                self._lives_here[unit.index] = OnDevice(
                    unit, storage, None, segments_of(unit, data)
                )
                at += unit.nbytes
        for event in events:
            self.device.synchronize(event)

    def _check_direct(self, chosen: Sequence[Unit]) -> None:
        """Look once at what will be read past the host, where nothing can check it."""
        if not self._verify or not chosen:
            return
        buffer = HostBuffer(max(unit.nbytes for unit in chosen))
        for unit in chosen:
            data = buffer.array[: unit.nbytes]
            self._reader.read(unit.record, data)
            check_record(unit.layout, unit.record.name, data)
