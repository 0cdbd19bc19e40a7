"""Which streamed units are in the staging area, and which one gives way."""

import heapq
from collections.abc import Iterable, Sequence

from endor.offload.experts import Popularity
from endor.offload.ledger import Counters
from endor.offload.schedule import Schedule
from endor.offload.staging import Range, Staging
from endor.offload.state import Phase, State
from endor.planning.tiers import PACKED_IN_RAM, Placement
from endor.planning.units import Unit
from endor.storage import HostBuffer

Rank = tuple[float, ...]
"""How early an occupant gives way: the smallest first."""

SLOT_SHARE = 0.875
"""Experts at least so large, compared with the largest, get its room: any then replaces any."""


class Residency:
    """The staging area and its occupants; guarded by the mover's lock.

    Reads ahead are placed from its beginning, experts from its end. Experts stay after their use
    until the memory is needed; then the one of least value gives way (see `Popularity`).

    Args:
        states: All units.
        staging_bytes: Memory that reads pass through.
        cache_bytes: Memory beside it in which experts are kept.
        counters: Where to count.
        schedule: Predicts the units that come next; learned here when omitted.

    Attributes:
        schedule: Predicts the streamed units that come next.
        popularity: Values experts.
        hinted: Units that were announced for the present layer.
        guessed: Experts that the next layer may use.
        held: The unit that each thread uses now.
    """

    def __init__(
        self,
        states: Sequence[State],
        staging_bytes: int,
        counters: Counters,
        *,
        schedule: Schedule | None = None,
        cache_bytes: int = 0,
    ) -> None:
        streamed = [state for state in states if not state.resident]
        routed = [state.unit.nbytes for state in streamed if not state.unit.scheduled]
        self._states = {state.unit.index: state for state in states}
        self._counters = counters
        self._staging = Staging(staging_bytes + cache_bytes if streamed else 0)
        self._slot_bytes = max(routed, default=0)
        # Experts and reads ahead share the staging area, half each.
        self._ahead_bytes = staging_bytes // 2 if routed else staging_bytes
        self._placed: dict[int, State] = {}
        self._used: dict[int, int] = {}
        self._clock = 0
        order = [state.unit.index for state in streamed if state.unit.scheduled]
        self.schedule = schedule or Schedule(order)
        self.popularity = Popularity()
        self.hinted: set[int] = set()
        self.guessed: set[int] = set()
        self.held: dict[int, State] = {}

    @property
    def nbytes(self) -> int:
        return self._staging.nbytes

    @property
    def buffer(self) -> HostBuffer | None:
        """The memory of the staging area."""
        return self._staging.buffer

    def window(self) -> list[State]:
        """Return the streamed units that come next and fit the read-ahead together."""
        out, total = [], 0
        for index in self.schedule.ahead():
            state = self._states.get(index)
            if state is None or state.resident:
                continue
            total += state.unit.nbytes
            if total > self._ahead_bytes:
                break
            out.append(state)
        return out

    def hold(self, thread: int, state: State) -> None:
        """Note that a thread uses a unit now."""
        index = state.unit.index
        self.held[thread] = state
        self.hinted.discard(index)
        self._clock += 1
        self._used[index] = self._clock
        if state.warm:
            state.warm = False
            self._counters.warm_used += 1
        if state.unit.scheduled:
            self.schedule.observe(index)

    def count(self, state: State) -> None:
        """Count a take, by how far the unit is."""
        if state.resident:
            return
        counters = self._counters
        if state.phase is Phase.READY:
            counters.hits += 1
        elif state.phase in (Phase.QUEUED, Phase.READING):
            counters.late += 1
        else:
            counters.misses += 1

    def release(self, thread: int) -> bool:
        """Take back what a thread uses; True when that left memory for others."""
        state = self.held.pop(thread, None)
        if state is None or not self._idle(state):
            return False
        if not state.unit.shared:
            self.forget(state)
        return True

    def forget(self, state: State) -> None:
        """Make a unit ABSENT; its memory is free for others, unless it is a resident's own."""
        if state.warm:
            state.warm = False
            if state.phase is Phase.QUEUED:
                self._counters.warm_revoked += 1
            else:
                self._counters.warm_wasted += 1
        state.phase, state.bound, state.error = Phase.ABSENT, None, None
        if not state.resident and state.place is not None:
            self._staging.give(state.place)
            state.place = None
            del self._placed[state.unit.index]

    def route(self, group: int, states: Sequence[State], wanted: Iterable[State]) -> None:
        """Note what a layer uses, and what its router wanted; wrong guesses are taken back."""
        chosen = {state.unit.index for state in wanted}
        counters = self._counters
        if self.guessed:
            counters.guesses += len(self.guessed)
            counters.guessed_uses += len(chosen)
            counters.right_guesses += len(chosen & self.guessed)
        for index in self.guessed - chosen:
            state = self._states[index]
            if state.warm and state.phase is Phase.QUEUED and self._idle(state):
                self.forget(state)
        self.guessed = set()
        self.hinted = {state.unit.index for state in states if not state.resident}
        self.popularity.observe(group, chosen)
        for index in self.hinted:
            phase = self._states[index].phase
            counters.expert_uses += 1
            counters.expert_hits += phase is Phase.READY
            counters.expert_late += phase in (Phase.QUEUED, Phase.READING)

    def make(self, wanted: State, *, force: bool) -> bool:
        """Find memory for `wanted`, others giving way; False when that is not enough.

        Args:
            wanted: A unit that is ABSENT.
            force: Someone waits for it: predictions give way too.
        """
        routed = not wanted.unit.scheduled
        nbytes = wanted.unit.nbytes
        span = self._slot_bytes if routed and nbytes >= SLOT_SHARE * self._slot_bytes else nbytes
        place = self._staging.take(nbytes, span_bytes=span, top=routed)
        if place is None:
            victims = self._victims(span, force=force)
            if victims is None:
                return False
            for victim in victims:
                if victim.phase is Phase.READY and victim.unit.shared:
                    self._counters.evicted += 1
                else:
                    self._counters.revoked += 1
                self.forget(victim)
            place = self._staging.take(nbytes, span_bytes=span, top=routed)
            assert place is not None
        wanted.place = place
        self._placed[wanted.unit.index] = wanted
        return True

    def _idle(self, state: State) -> bool:
        return not state.waiters and state not in self.held.values()

    def _victims(self, nbytes: int, *, force: bool) -> list[State] | None:
        """Return neighbours whose memory, with the free memory between, makes up `nbytes`.

        Occupants are given up in the order of their rank until there is a stretch that is long
        enough; those outside it stay.
        """
        distance = {state.unit.index: at for at, state in enumerate(self.window())}
        queue = []
        for index, state in self._placed.items():
            if state.phase is Phase.READING or not self._idle(state):
                continue
            rank = self._rank(state, distance, force=force)
            if rank is not None:
                queue.append((rank, index))
        heapq.heapify(queue)
        free = dict(self._staging.free)
        begins = {stop: start for start, stop in free.items()}
        gone: list[State] = []
        while queue:
            state = self._states[heapq.heappop(queue)[1]]
            gone.append(state)
            assert state.place is not None
            start, stop = state.place.start, state.place.stop
            if stop in free:
                stop = free.pop(stop)
            if start in begins:
                start = begins.pop(start)
            free[start], begins[stop] = stop, start
            if stop - start >= nbytes:
                return _needed(gone, start, stop, nbytes)
        return None

    def _rank(self, state: State, distance: dict[int, int], *, force: bool) -> Rank | None:
        """Return how early a unit gives way, None when it does not.

        First what nothing predicts any more, then weights used before, longest unused first, then
        experts by their value. For a forced request also guesses, and what is predicted: reads that
        have not begun, then those done, farthest first.
        """
        index, unit, queued = state.unit.index, state.unit, state.phase is Phase.QUEUED
        if index not in self.hinted and index not in distance and index not in self.guessed:
            used = self._used.get(index, 0)
            if not unit.shared or (queued and unit.scheduled):
                return (0,)
            if not unit.scheduled:
                return (2, self.popularity.value(index), used)
            if index != self.schedule.last:
                return (1, used)
        if not force:
            return None
        if index in self.guessed and index not in self.hinted:
            return (3, not queued)
        return (4, not queued, -distance.get(index, -1))


def _needed(gone: Iterable[State], start: int, stop: int, nbytes: int) -> list[State]:
    """Return those of `gone` that must go for `nbytes` between `start` and `stop`."""
    places = [(state.place, state) for state in gone if state.place is not None]
    inside = [(place, state) for place, state in places if start <= place.start < stop]
    inside.sort(key=lambda item: item[0].start)
    while len(inside) > 1 and stop - inside[0][0].stop >= nbytes:
        start = inside.pop(0)[0].stop
    while len(inside) > 1 and inside[-1][0].start - start >= nbytes:
        stop = inside.pop()[0].start
    return [state for _, state in inside]


def cached_experts(units: Sequence[Unit], placement: Placement) -> list[str]:
    """Return the experts whose memory is shared by all experts: none when all stay in memory."""
    routed = [unit for unit in units if not unit.scheduled]
    if all(placement.tiers[unit.name] != "disk" for unit in routed):
        return []
    return [unit.name for unit in routed if placement.tiers[unit.name] == "resident"]


def states_of(
    units: Sequence[Unit], placement: Placement, cached: Sequence[str]
) -> dict[str, State]:
    """Return where the units are at first, by name; `cached` ones do not stay."""
    out = {}
    for unit in units:
        tier = placement.tiers[unit.name]
        stays = tier in PACKED_IN_RAM and unit.name not in cached
        out[unit.name] = State(unit, stays, decoded=tier == "decoded")
    return out


def place_residents(states: Iterable[State]) -> HostBuffer | None:
    """Give units that stay in memory their places, in one buffer; None when there are none."""
    residents = [state for state in states if state.resident]
    if not residents:
        return None
    buffer, at = HostBuffer(sum(state.nbytes for state in residents)), 0
    for state in residents:
        stop = at + state.nbytes
        state.place = Range(at, stop, buffer.array[at:stop])
        at = stop
    return buffer
