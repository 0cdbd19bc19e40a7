"""What brings units to where they are multiplied: into host memory, or onto a device."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol, TypeVar

from endor.offload.ledger import Ledger
from endor.offload.state import State, States

Held = TypeVar("Held")
"""A unit where it is used: its tensors as host arrays, or its record on a device."""


class Mover(Protocol[Held]):
    """Owns the memory that packed units live in or pass through, and moves their bytes.

        take(state) -> held . expand or multiply . release(held)

    A thread holds at most one unit, so that every order of takes ends: taking the next gives the
    last back. Every method may be called from any thread; `close` wins over all of them.

    Attributes:
        ledger: Where it counts.
        states: Whereabouts of each unit, by name.
    """

    ledger: Ledger
    states: Mapping[str, State]

    @property
    def streams(self) -> bool:
        """Whether any unit is moved for its use."""

    @property
    def staging_bytes(self) -> int:
        """Host memory that units pass through."""

    @property
    def held_nbytes(self) -> int:
        """Memory that packed units take, wherever it is: at home, in staging and in slots."""

    def take(self, state: State) -> Held:
        """Return a unit where it is used, waiting for it if need be; it holds until `release`.

        Raises:
            ReadError: The bytes did not come; the next take tries again.
            FormatError: They are damaged.
            BackendError: The mover is closed, or this is a forked child.
        """

    def release(self, held: Held, *, hold: bool = False) -> None:
        """Give a unit back, once everything that reads it was called or enqueued.

        Args:
            held: From `take`.
            hold: Keep it for this thread's next `take` of the same unit, or until `drop`.
        """

    def drop(self) -> None:
        """Give back what this thread kept, if anything."""

    def near(self, state: State) -> bool:
        """Whether a unit can be used as fast as any: a guess, which may be over at once."""

    def hint(self, states: States, *, group: int = 0, wanted: States | None = None) -> None:
        """Ask for units that will be taken at once, in this order, as far as there is room.

        Args:
            states: The experts that a router chose.
            group: Names the router's layer.
            wanted: What the router chose, where others take the place of some: what counts as used.
        """

    def warm(self, states: Iterable[State]) -> None:
        """Read units that the next `hint` may ask for, in this order, as far as there is room."""

    def forget(self, states: Iterable[State]) -> None:
        """Read units no more ahead of their use: they were expanded for good."""

    def preload(self) -> None:
        """Wait until every unit that stays packed is in memory; errors as for `take`."""

    def post(self, priority: int, run: Callable[[], None]) -> None:
        """Have a task that is no unit's read run on a loader thread, in its turn.

        It handles its errors itself. A closed mover runs nothing.
        """

    def report(self) -> dict[str, Any]:
        """Return what is to be said of this kind of mover alone; plain data."""

    def close(self) -> None:
        """Stop moving and let go of all memory; may be called twice."""
