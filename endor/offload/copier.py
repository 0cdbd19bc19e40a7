"""Copies packed units into device slots, ahead of their use, on a stream of their own.

                     copy stream:  wait(uses of the slot) . copy . record(ready)
    a caller's current stream:                             wait(ready) . expand . record(use)

A slot goes EMPTY -> QUEUED -> LOADING -> READY and stays READY after its use, until another unit
needs the slot. The host never waits for the device: `take` returns when the copy was *issued*, and
events order the rest. Disk reads happen on the copier's thread, behind `Source.acquire`.

Speculation follows the schedule, which runs on across the token boundary, and is revocable. These
rules make every order of takes end, with any number of slots from one up:

- whoever holds a slot waits for nothing before it gives it back;
- a demand may take any slot that is neither held, nor awaited, nor LOADING; LOADING ends, since a
  read ends, in READY or in an error that the taker gets;
- a slot loaded for a taker that still waits is not taken by another.

A guess (at the next router's choice) is copied where nothing surer is to be copied, a piece at a
time, and given up between two pieces for whatever is: that waits for one piece at most.
"""

import threading
import time
from collections.abc import Iterable, Sequence

import torch

from endor.errors import BackendError, ConfigError, EndorError
from endor.offload.device import Device
from endor.offload.schedule import Schedule
from endor.offload.slots import CopyCounters, Slot, SlotPhase
from endor.offload.source import Pieces, Source, cut_up
from endor.planning.tiers import COPY_PIECE_BYTES
from endor.threads import join_all, start_all


class Copier:
    """Brings units into device slots.

    Args:
        device: Where to.
        source: Where from.
        buffers: Device memory of each slot; every unit fits each.
        schedule: Predicts the units that come next; learns from what is taken.
        workers: Threads that acquire and copy; more than one when acquiring takes long.
    """

    def __init__(
        self,
        device: Device,
        source: Source,
        buffers: Sequence[torch.Tensor],
        schedule: Schedule,
        *,
        workers: int = 1,
    ) -> None:
        if not buffers:
            raise ConfigError("copying to a device needs at least one slot, got none")
        self.counters = CopyCounters()
        self._device = device
        self._source = source
        self._slots = [Slot(at, buffer, device.event()) for at, buffer in enumerate(buffers)]
        self._schedule = schedule
        self._hinted: list[int] = []
        self._guessed: list[int] = []
        self._awaited: dict[int, int] = {}
        self._errors: dict[int, EndorError] = {}
        self._failed: set[int] = set()
        self._demands: list[Slot] = []
        self._closed = False
        self._lock = threading.Lock()
        self._work = threading.Condition(self._lock)
        self._changed = threading.Condition(self._lock)
        self._issue = threading.Lock()
        self._threads = [
            threading.Thread(target=self._run, name=f"endor-copier-{at}", daemon=True)
            for at in range(workers)
        ]
        start_all(self._threads, self.close)

    @property
    def slots(self) -> int:
        """Number of slots."""
        return len(self._slots)

    def take(self, unit: int) -> Slot:
        """Return the slot that holds `unit`; the caller's current stream waits for the copy.

        The slot is the caller's until `release`. Waits only until the copy is issued.

        Raises:
            EndorError: The unit's bytes did not come; the next take tries again.
            BackendError: The copier is closed, or all slots are held by this very thread.
        """
        me = threading.get_ident()
        with self._lock:
            self._check_open()
            self._schedule.observe(unit)
            if unit in self._hinted:
                self._hinted.remove(unit)
            self._count(unit)
            self._awaited[unit] = self._awaited.get(unit, 0) + 1
            start = 0.0
            try:
                while (slot := self._ready(unit)) is None:
                    if unit in self._errors:
                        raise self._errors[unit]
                    self._demand(unit, me)
                    start = start or time.perf_counter()
                    self._changed.wait()
                    self._check_open()
                slot.holders.append(me)
            finally:
                self._awaited[unit] -= 1
                if not self._awaited[unit]:
                    del self._awaited[unit]
                    self._errors.pop(unit, None)
                if start:
                    self.counters.stall_s += time.perf_counter() - start
                self._work.notify_all()
        self._device.await_in_compute(slot.ready)
        return slot

    def release(self, slot: Slot) -> None:
        """Give a slot back: work enqueued so far on the caller's current stream still uses it."""
        stream = self._device.compute_stream()
        with self._lock:
            event = slot.uses.get(stream)
            if event is None:
                event = slot.uses[stream] = self._device.event()
            self._device.record_compute(event)
            me = threading.get_ident()
            slot.holders.remove(me if me in slot.holders else slot.holders[0])
            self._work.notify_all()
            self._changed.notify_all()

    def hint(self, units: Iterable[int]) -> None:
        """Ask for units that will be taken next, in this order, as far as there are slots."""
        with self._lock:
            self._hinted, self._guessed = list(dict.fromkeys(units)), []
            self._work.notify_all()

    def guess(self, units: Iterable[int]) -> None:
        """Copy units that the next `hint` may ask for, the likeliest first, after all others."""
        with self._lock:
            self._guessed = list(dict.fromkeys(units))
            self._work.notify_all()

    def forget(self, units: Iterable[int]) -> None:
        """Copy units no more ahead of their use."""
        with self._lock:
            self._schedule.forget(units)

    def close(self) -> None:
        """Stop copying; later takes are errors. May be called twice.

        What was issued still runs: synchronise before the slots' or the source's memory goes.
        """
        with self._lock:
            self._closed = True
            self._work.notify_all()
            self._changed.notify_all()
        join_all(self._threads)

    # ---- under the lock ------------------------------------------------------------------------

    def _check_open(self) -> None:
        if self._closed:
            raise BackendError("the weights of this model were closed; load it again")

    def _count(self, unit: int) -> None:
        slot = self._slot_of(unit)
        if slot is None:
            self.counters.misses += 1
        elif slot.phase is SlotPhase.READY:
            self.counters.hits += 1
        else:
            self.counters.late += 1

    def _slot_of(self, unit: int) -> Slot | None:
        return next((slot for slot in self._slots if slot.unit == unit), None)

    def _ready(self, unit: int) -> Slot | None:
        slot = self._slot_of(unit)
        return slot if slot is not None and slot.phase is SlotPhase.READY else None

    def _demand(self, unit: int, me: int) -> None:
        """See that `unit` is loaded next; does nothing while no slot can be had."""
        slot = self._slot_of(unit)
        if slot is None:
            slot = self._victim(self._window(), len(self._slots), force=True)
            if slot is None:
                if all(me in other.holders for other in self._slots):
                    raise BackendError(
                        f"this thread holds all {len(self._slots)} device slots and asks for one "
                        "more: release a slot first"
                    )
                return
            self._assign(slot, unit)
        if slot.phase is SlotPhase.QUEUED and slot not in self._demands:
            self._demands.append(slot)
            self._work.notify_all()

    def _window(self) -> list[int]:
        """The units to have on the device, the most urgent first."""
        window = list(self._hinted[: len(self._slots)])
        for unit in (*self._schedule.ahead(), *self._guessed):
            if len(window) >= len(self._slots):
                break
            if unit not in window:
                window.append(unit)
        return window

    def _victim(self, window: list[int], rank: int, *, force: bool) -> Slot | None:
        """Return the slot to give up for the `rank`-th unit of the window, or for a demand."""
        best: Slot | None = None
        best_rank = -1
        for slot in self._slots:
            if slot.holders or slot.phase is SlotPhase.LOADING or slot.unit in self._awaited:
                continue
            if slot.unit is None:
                return slot
            found = window.index(slot.unit) if slot.unit in window else len(window) + 1
            if found > best_rank and (force or found > rank):
                best, best_rank = slot, found
        return best

    def _assign(self, slot: Slot, unit: int) -> None:
        if slot.unit is not None and (slot.phase is SlotPhase.QUEUED or not slot.uses):
            self.counters.revoked += 1
        slot.unit, slot.phase = unit, SlotPhase.QUEUED

    def _next(self) -> Slot | None:
        """The slot to load now: for a demand, else the most urgent unit that is not there."""
        while self._demands:
            slot = self._demands.pop(0)
            if slot.phase is SlotPhase.QUEUED:
                return slot
        if any(self._slot_of(unit) is None for unit in self._awaited):
            return None  # the next free slot is for a taker
        window = self._window()
        for rank, unit in enumerate(window):
            if unit in self._failed:
                continue
            if self._slot_of(unit) is None:
                victim = self._victim(window, rank, force=False)
                if victim is not None and self._is_guess(unit) and not self._is_over(victim):
                    return None  # the copy would wait for what still uses the slot
                if victim is not None:
                    self._assign(victim, unit)
                return victim
        return None

    def _is_guess(self, unit: int) -> bool:
        """Whether a unit is wanted because of a guess alone."""
        known = unit in self._awaited or unit in self._hinted
        return not known and unit in self._guessed and unit not in self._schedule.ahead()

    def _is_over(self, slot: Slot) -> bool:
        """Whether nothing enqueued uses a slot any more."""
        return all(self._device.is_over(event) for event in slot.uses.values())

    def _gives_up(self, unit: int) -> bool:
        """Whether a unit that is being copied is a guess no more, and others are to be copied."""
        with self._lock:
            if self._closed:
                return True
            if unit in self._awaited or unit in self._hinted:
                return False
            if self._demands or any(self._slot_of(other) is None for other in self._awaited):
                return True
            sure = [*self._hinted, *self._schedule.ahead()][: len(self._slots)]
            return any(self._slot_of(other) is None for other in sure if other not in self._failed)

    # ---- copier threads ------------------------------------------------------------------------

    def _run(self) -> None:
        with self._device.current():
            self._serve()

    def _serve(self) -> None:
        while (slot := self._wait_for_work()) is not None:
            unit, nbytes = slot.unit, None
            error: EndorError | None = None
            assert unit is not None
            try:
                nbytes = self._load(slot, unit, guess=slot.guess)
            except EndorError as found:
                error = found
            except BaseException as found:  # whatever it is, a taker must not wait for ever
                error = BackendError(f"unit {unit} could not be copied to the device: {found!r}")
                error.__cause__ = found
            with self._lock:
                if error is not None:
                    slot.unit, slot.phase = None, SlotPhase.EMPTY
                    self.counters.failures += 1
                    self._failed.add(unit)
                    if unit in self._awaited:
                        self._errors[unit] = error
                elif nbytes is None:
                    slot.unit, slot.phase = None, SlotPhase.EMPTY
                    self.counters.given_up += 1
                else:
                    slot.phase = SlotPhase.READY
                    self._failed.discard(unit)
                    self.counters.copies += 1
                    self.counters.copy_bytes += nbytes
                self._changed.notify_all()

    def _wait_for_work(self) -> Slot | None:
        with self._lock:
            while not self._closed:
                slot = self._next()
                if slot is not None:
                    assert slot.unit is not None
                    slot.phase, slot.guess = SlotPhase.LOADING, self._is_guess(slot.unit)
                    self.counters.guesses += slot.guess
                    return slot
                self._work.wait()
            return None

    def _load(self, slot: Slot, unit: int, *, guess: bool) -> int | None:
        """Bring a unit into a slot and return its bytes; None where a guess was given up."""
        if self._source.reads_directly(unit):
            # The read is in no stream: what uses the slot, or still copies into it, must be over.
            for event in (*slot.uses.values(), slot.ready):
                self._device.synchronize(event)
            slot.uses.clear()
            return self._source.read_into(unit, slot.buffer)
        pieces = self._source.acquire(unit)
        if guess:
            for piece in cut_up(pieces, COPY_PIECE_BYTES):
                if self._gives_up(unit):
                    return None
                self._issue_copy(slot, [piece])
                self._device.synchronize(slot.ready)
        else:
            self._issue_copy(slot, pieces)
        self._source.issued(unit, slot.ready)
        return sum(data.nbytes for _, data in pieces)

    def _issue_copy(self, slot: Slot, pieces: Pieces) -> None:
        with self._issue:  # the order in the stream is that of the calls
            for event in slot.uses.values():
                self._device.await_in_copy(event)
            slot.uses.clear()
            for at, data in pieces:
                self._device.copy(slot.buffer[at:], data)
            self._device.record_copy(slot.ready)
