"""Device memory that one unit at a time passes through."""

from collections.abc import Hashable
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Any

import torch


class SlotPhase(Enum):
    """How far a slot is; see `endor.offload.copier`."""

    EMPTY = auto()
    QUEUED = auto()
    LOADING = auto()
    READY = auto()


@dataclass(eq=False, slots=True)
class Slot:
    """A piece of device memory that holds one unit at a time.

    Attributes:
        index: Position among the slots.
        buffer: Device memory.
        ready: Recorded behind the copy.
        unit: The unit that is or will be in it.
        phase: How far it is.
        holders: Takes that were not given back.
        uses: Event per compute stream, recorded behind its last use since the copy.
        guess: Whether what is LOADING is there because of a guess alone.
    """

    index: int
    buffer: torch.Tensor
    ready: Any
    unit: int | None = None
    phase: SlotPhase = SlotPhase.EMPTY
    holders: list[int] = field(default_factory=list)
    uses: dict[Hashable, Any] = field(default_factory=dict)
    guess: bool = False


@dataclass(slots=True)
class CopyCounters:
    """What the copier did.

    Attributes:
        copies: Units copied.
        copy_bytes: Their bytes.
        hits: Takes that found the copy issued.
        late: Takes that found it under way.
        misses: Takes that nobody had foreseen.
        revoked: Speculative copies, done or queued, that were given up unused for a demand.
        guesses: Copies that began because of a guess at the next router's choice.
        given_up: Of these, those given up half done.
        failures: Units that did not come.
        stall_s: Time that takers waited for a copy to be issued.
    """

    copies: int = 0
    copy_bytes: int = 0
    hits: int = 0
    late: int = 0
    misses: int = 0
    revoked: int = 0
    guesses: int = 0
    given_up: int = 0
    failures: int = 0
    stall_s: float = 0.0
