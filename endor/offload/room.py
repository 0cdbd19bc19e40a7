"""Which streamed units have memory in the staging area, and which one gives way."""

from collections import OrderedDict
from collections.abc import Sequence

from endor.offload.ledger import Counters
from endor.offload.memory import Staging
from endor.offload.schedule import Schedule
from endor.offload.state import Phase, State
from endor.storage import HostBuffer


class Room:
    """The staging area and its occupants; guarded by the engine's lock.

    Attributes:
        schedule: Predicts the streamed units that come next.
        hinted: Units that were announced for the present layer.
        held: The unit that each thread uses now.
    """

    def __init__(self, states: Sequence[State], nbytes: int, counters: Counters) -> None:
        streamed = [state for state in states if not state.resident]
        self._states = states
        self._counters = counters
        self._staging = Staging(nbytes if streamed else 0)
        # Kept units (experts) and reads ahead share the area, half each.
        mixed = any(state.unit.shared for state in streamed)
        self._ahead_bytes = self._staging.nbytes // (2 if mixed else 1)
        self._placed: dict[int, State] = {}
        self._kept: OrderedDict[int, None] = OrderedDict()
        self.schedule = Schedule([state.unit.index for state in streamed if state.unit.scheduled])
        self.hinted: set[int] = set()
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
            state = self._states[index]
            total += state.unit.nbytes
            if total > self._ahead_bytes:
                break
            out.append(state)
        return out

    def hold(self, thread: int, state: State) -> None:
        """Note that a thread uses a unit now."""
        self.held[thread] = state
        self._kept.pop(state.unit.index, None)
        self.hinted.discard(state.unit.index)
        if state.unit.scheduled:
            self.schedule.observe(state.unit.index)

    def release(self, thread: int) -> bool:
        """Take back what a thread uses; True when that left memory for others."""
        state = self.held.pop(thread, None)
        if state is None or not self._idle(state):
            return False
        if state.unit.shared:
            self._kept[state.unit.index] = None
        else:
            self.forget(state)
        return True

    def forget(self, state: State) -> None:
        """Make a unit ABSENT; its memory is free for others, unless it is a resident's own."""
        state.phase, state.bound, state.error = Phase.ABSENT, None, None
        self._kept.pop(state.unit.index, None)
        if not state.resident and state.place is not None:
            self._staging.give(state.place)
            state.place = None
            del self._placed[state.unit.index]

    def make(self, wanted: State, *, force: bool) -> bool:
        """Find memory for `wanted`, others giving way; False when that is not enough.

        Args:
            force: Someone waits for it: predictions give way too.
        """
        while True:
            place = self._staging.take(wanted.unit.nbytes)
            if place is not None:
                wanted.place = place
                self._placed[wanted.unit.index] = wanted
                return True
            victim = self._victim(force=force)
            if victim is None:
                return False
            if victim.unit.index in self._kept:
                self._counters.evicted += 1
            else:
                self._counters.revoked += 1
            self.forget(victim)

    def _idle(self, state: State) -> bool:
        return not state.waiters and state not in self.held.values()

    def _victim(self, *, force: bool) -> State | None:
        """Return the least useful unit whose memory may be taken.

        First what nothing predicts any more, then kept units, longest unused first. For a forced
        request also what is predicted: reads that have not begun, then those done, farthest first.
        """
        distance = {state.unit.index: at for at, state in enumerate(self.window())}
        movable = {
            index: state
            for index, state in self._placed.items()
            if state.phase is not Phase.READING and self._idle(state)
        }
        for index, state in movable.items():
            if index not in distance and index not in self.hinted and index not in self._kept:
                return state
        for index in self._kept:
            if index in movable and index not in self.hinted:
                return movable[index]
        if not force:
            return None
        return max(
            movable.values(),
            key=lambda state: (
                state.phase is Phase.QUEUED,
                distance.get(state.unit.index, -1),
            ),
            default=None,
        )
