"""Where a unit is at the moment."""

from collections.abc import Iterable, Mapping
from enum import Enum, auto

from endor.codecs import Encoded, TensorSpec
from endor.errors import EndorError
from endor.offload.staging import Range
from endor.planning.units import Unit

Bound = Mapping[str, Encoded]
"""Stored tensors of a unit, by name, as views of its bytes."""

States = Iterable["State"]

DEMAND, HINT, KEYS, AHEAD, WARM, FILL = range(6)
"""Priority of a task: someone waits for a unit; it will be needed at once; the next layer's keys
and values; comes next by the schedule; a guess at the next router's choice; for later."""


class Phase(Enum):
    """See `endor.offload.host_mover`."""

    ABSENT = auto()
    QUEUED = auto()
    READING = auto()
    READY = auto()
    FAILED = auto()


class State:
    """A unit's whereabouts; guarded by the engine's lock, but for `fixed`.

    Attributes:
        unit: The unit.
        resident: Whether its bytes stay in memory once read.
        decoded: Whether they stay with their entropy code undone.
        fixed: Its tensors, once a resident unit was read: readable without the lock.
        phase: How far it is.
        place: Where its bytes are or will be.
        bound: Its tensors while READY.
        error: Why it FAILED.
        priority: Of the queued read.
        waiters: Threads that wait for it.
        warm: Whether a guess at a router's choice brought it, and it was not used since.
    """

    __slots__ = (
        "bound",
        "decoded",
        "error",
        "fixed",
        "phase",
        "place",
        "priority",
        "resident",
        "unit",
        "waiters",
        "warm",
    )

    def __init__(self, unit: Unit, resident: bool, *, decoded: bool = False) -> None:
        self.unit = unit
        self.resident = resident
        self.decoded = decoded
        self.fixed: Bound | None = None
        self.phase = Phase.ABSENT
        self.place: Range | None = None
        self.bound: Bound | None = None
        self.error: EndorError | None = None
        self.priority = FILL
        self.waiters = 0
        self.warm = False

    @property
    def nbytes(self) -> int:
        """Bytes of memory that its place takes."""
        return self.unit.decoded_nbytes if self.decoded else self.unit.nbytes

    def spec(self, tensor: str) -> TensorSpec:
        """Return the form in which one of its tensors is in memory."""
        spec = self.unit.layout.tensors[tensor].spec
        return spec.decoded if self.decoded else spec
