"""Moves units between disk and memory: reader threads, staging, read-ahead that can be revoked.

A unit that is not resident goes through:

    ABSENT -> QUEUED -> READING -> READY -> taken, dropped -> ABSENT, or READY while it is kept
        ^____________________________/ \\-> FAILED -> error raised by the taker -> ABSENT
         gives way to a demand

Three rules make every order of takes end: a thread holds at most one unit, and gives it back before
it waits for another; a demand may take the memory of anything that is neither held nor awaited nor
just being read; and what is being read becomes READY or FAILED, since a read ends.

Where only a part of the experts fits in memory, it becomes a cache of all, which starts with them.
"""

import heapq
import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from endor.errors import BackendError, EndorError, ReadError
from endor.kernels.dispatch import check_threads
from endor.offload.decoded import decode_unit
from endor.offload.ledger import Ledger
from endor.offload.residency import Residency, cached_experts, place_residents, states_of
from endor.offload.schedule import Schedule
from endor.offload.state import AHEAD, DEMAND, FILL, HINT, WARM, Bound, Phase, State, States
from endor.planning.tiers import Placement
from endor.planning.units import Unit
from endor.storage import CheckedRecord, HostBuffer, RecordReader
from endor.threads import join_all, start_all


class HostMover:
    """A `Mover` into host memory.

    Beside a device it moves what passes through host memory on its way there: copies are then what
    takes units, and the device's units are not its own.

    Args:
        units: Units, in execution order.
        placement: Their tiers; checked.
        reader: Reads records; the mover closes it.
        verify: Check each unit's checksum whenever it is read, and its structure the first time.
        threads: Reads in flight.
        ledger: Where to count; one of its own when omitted.
        schedule: The order in which a device uses units; without one, it is learned here.
        on_device: Whether units go on to a device.

    Attributes:
        ledger: Where it counts.
        states: State per unit name.
        cache_bytes: Memory in which a changing part of the experts stays.
    """

    def __init__(
        self,
        units: Sequence[Unit],
        placement: Placement,
        reader: RecordReader,
        *,
        verify: bool = True,
        threads: int = 2,
        ledger: Ledger | None = None,
        schedule: Schedule | None = None,
        on_device: bool = False,
    ) -> None:
        placement.check(units, on_device=on_device)
        placement.check_staging(units)
        check_threads(threads)
        self.ledger = ledger or Ledger()
        cached = cached_experts(units, placement)
        self.states: Mapping[str, State] = states_of(units, placement, cached)
        self._by_index = {state.unit.index: state for state in self.states.values()}
        self.cache_bytes = sum(self.states[name].unit.nbytes for name in cached)
        self._residency = Residency(
            list(self.states.values()),
            placement.staging_bytes,
            self.ledger.counters,
            schedule=schedule,
            cache_bytes=self.cache_bytes,
        )
        self._reader = reader
        made = (
            CheckedRecord(unit.layout, unit.name, unit.tensors, verify=verify) for unit in units
        )
        self._records = {unit.index: record for unit, record in zip(units, made, strict=True)}
        self._lock = threading.Lock()
        self._work = threading.Condition(self._lock)
        self._done = threading.Condition(self._lock)
        self._jobs: list[tuple[int, int, int | Callable[[], None]]] = []
        self._tickets = 0
        self._closed = False
        self._pid = os.getpid()
        with self._lock:
            self._residents = place_residents(self.states.values())
            for state in self.states.values():
                if state.resident:
                    self._queue(state, FILL)
            self._ask((self.states[name] for name in cached), FILL)
            self._ask(self._residency.window(), AHEAD)
        self._threads = [
            threading.Thread(target=self._run, name=f"endor-loader-{at}", daemon=True)
            for at in range(threads)
        ]
        start_all(self._threads, self.close)

    @property
    def streams(self) -> bool:
        """Whether any unit is not resident."""
        return self._residency.nbytes > 0

    @property
    def staging_bytes(self) -> int:
        """Bytes of the staging area, beside the cache of experts."""
        return max(0, self._residency.nbytes - self.cache_bytes)

    @property
    def held_nbytes(self) -> int:
        """Bytes of memory for packed units: those that stay, the cache, and staging."""
        stays = sum(state.nbytes for state in self.states.values() if state.resident)
        return stays + self.cache_bytes + self.staging_bytes

    @property
    def buffers(self) -> list[HostBuffer]:
        """The memory that units stay in or pass through; it never moves."""
        return [item for item in (self._residents, self._residency.buffer) if item is not None]

    def take(self, state: State) -> Bound:
        """Return the tensors of a unit, waiting for it if need be; see `Mover.take`."""
        fixed = state.fixed
        if fixed is not None:
            return fixed
        if os.getpid() != self._pid:
            raise BackendError(
                "streamed weights do not survive a fork: load the model in the child, or start "
                "it with the 'spawn' method"
            )
        me = threading.get_ident()
        with self._lock:
            if self._residency.release(me):
                self._done.notify_all()
            self._check_open()
            self._residency.count(state)
            self._await(state)
            assert state.bound is not None
            if not state.resident:
                self._residency.hold(me, state)
                self._ask(self._residency.window(), AHEAD)
            return state.bound

    def release(self, held: Bound, *, hold: bool = False) -> None:
        """Give back the unit that this thread holds, unless it is to be kept."""
        if not hold:
            self.drop()

    def drop(self) -> None:
        """Give back the unit that this thread holds, if any."""
        with self._lock:
            if self._residency.release(threading.get_ident()):
                self._done.notify_all()
                if not self._closed:
                    self._ask(self._residency.window(), AHEAD)

    def near(self, state: State) -> bool:
        """Whether a unit is in memory now."""
        return state.phase is Phase.READY

    def hint(self, states: States, *, group: int = 0, wanted: States | None = None) -> None:
        """Read units that will be taken at once; see `Mover.hint`."""
        with self._lock:
            chosen = list(dict.fromkeys(states))
            self._residency.route(group, chosen, chosen if wanted is None else wanted)
            self._ask(chosen, HINT)

    def warm(self, states: Iterable[State]) -> None:
        """Read units last, into memory of experts that are worth less; see `Mover.warm`."""
        with self._lock:
            chosen = list(dict.fromkeys(states))
            self._residency.guessed = {state.unit.index for state in chosen}
            self._ask(chosen, WARM)

    def post(self, priority: int, run: Callable[[], None]) -> None:
        """Have a task run on a loader thread, in its turn; see `Mover.post`."""
        with self._lock:
            if not self._closed and os.getpid() == self._pid:
                self._tickets += 1
                heapq.heappush(self._jobs, (priority, self._tickets, run))
                self._work.notify()

    def forget(self, states: Iterable[State]) -> None:
        """Read units no more ahead of their use."""
        with self._lock:
            self._residency.schedule.forget(state.unit.index for state in states)

    def preload(self) -> None:
        """Wait until every resident unit is in memory, and the cache of experts is filled.

        Errors as for `take`.
        """
        for state in self.states.values():
            if state.resident:
                self.take(state)
        with self._lock:
            while any(
                state.priority == FILL and state.phase in (Phase.QUEUED, Phase.READING)
                for state in self.states.values()
            ):
                self._check_open()
                self._done.wait()

    def report(self) -> dict[str, Any]:
        """Return nothing: all of it is said of every mover."""
        return {}

    def close(self) -> None:
        """Stop reading and let go of all memory; taking afterwards is an error."""
        if self._pid != os.getpid():
            return
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self._jobs.clear()
            for state in self.states.values():
                state.fixed = state.bound = None
            self._work.notify_all()
            self._done.notify_all()
        self._reader.close()
        join_all(self._threads)
        self._residents = None

    # ---- under the lock ------------------------------------------------------------------------

    def _check_open(self) -> None:
        if self._closed:
            raise BackendError("the weights of this model were closed; load it again")

    def _await(self, state: State) -> None:
        """Return when `state` is READY; raise what made it fail."""
        start = 0.0
        while state.phase is not Phase.READY:
            if state.phase is Phase.FAILED:
                error = state.error
                assert error is not None
                self._residency.forget(state)  # the next take reads it again
                raise error
            self._demand(state)
            start = start or time.perf_counter()
            state.waiters += 1
            try:
                self._done.wait()
            finally:
                state.waiters -= 1
            self._check_open()
        if start:
            self.ledger.note_stall(state.unit.name, start, state.unit.nbytes)

    def _demand(self, state: State) -> None:
        """See that `state` is read next; leaves it ABSENT while no memory can be had."""
        if state.phase is Phase.QUEUED:
            if state.priority != DEMAND:
                self._queue(state, DEMAND)
        elif state.phase is Phase.ABSENT and (
            state.place is not None or self._residency.make(state, force=True)
        ):
            self._queue(state, DEMAND)

    def _queue(self, state: State, priority: int) -> None:
        """Ask for a read; an earlier request of lower priority is skipped when its turn comes."""
        state.phase, state.priority = Phase.QUEUED, priority
        self._tickets += 1
        heapq.heappush(self._jobs, (priority, self._tickets, state.unit.index))
        self._work.notify()

    def _ask(self, states: Iterable[State], priority: int) -> None:
        """Have units read that are neither here nor on their way, as far as there is room."""
        for state in states:
            if self._closed or state.resident:
                continue
            if state.phase is Phase.ABSENT:
                if not self._residency.make(state, force=False):
                    return
                state.warm = priority == WARM
                self._queue(state, priority)
            elif state.phase is Phase.QUEUED and priority == HINT < state.priority:
                self._queue(state, HINT)

    # ---- loader threads ------------------------------------------------------------------------

    def _run(self) -> None:
        while (state := self._next()) is not None:
            if not isinstance(state, State):
                state()
                continue
            bound, error = None, None
            try:
                bound = self._read(state)
            except EndorError as found:
                error = found
            except BaseException as found:  # whatever it is, a taker must not wait for ever
                error = ReadError(f"{state.unit.record.path}: {state.unit.name}: {found!r}")
                error.__cause__ = found
            with self._lock:
                if self._closed:
                    return
                state.bound, state.error = bound, error
                state.phase = Phase.READY if error is None else Phase.FAILED
                if error is not None:
                    self.ledger.counters.failures += 1
                elif state.resident:
                    state.fixed = bound
                self._done.notify_all()

    def _next(self) -> State | Callable[[], None] | None:
        with self._lock:
            while not self._closed:
                while self._jobs:
                    priority, _, job = heapq.heappop(self._jobs)
                    if not isinstance(job, int):
                        return job
                    state = self._by_index[job]
                    if state.phase is Phase.QUEUED and state.priority == priority:
                        state.phase = Phase.READING
                        return state
                self._work.wait()
            return None

    def _read(self, state: State) -> Bound:
        """Return the tensors of a unit that is READING, read into its place and checked."""
        unit, place, ledger = state.unit, state.place, self.ledger
        assert place is not None
        record = self._records[unit.index]
        memory = HostBuffer(unit.nbytes).array if state.decoded else place.array
        start = time.perf_counter()
        stat = self._reader.read(record.record, memory)
        stop = time.perf_counter()
        checked = record.check(memory)
        end = time.perf_counter() if checked else stop
        with self._lock:
            ledger.note_read(unit.name, start, stop, end, stat)
            ledger.counters.warm_reads += state.warm
        bound = record.bind(memory)
        return decode_unit(unit, bound, place.array) if state.decoded else bound
