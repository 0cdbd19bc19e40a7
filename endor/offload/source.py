"""What a copier asks for the bytes of units, and how these are cut up."""

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch

Pieces = Sequence[tuple[int, np.ndarray]]


class Source(Protocol):
    """Where the bytes of units come from."""

    def acquire(self, unit: int) -> Pieces:
        """Return the bytes of a unit, and where in the slot each piece of them goes.

        May wait for the disk. Called on a copier thread. They stay as they are until the event
        given to `issued` has happened.
        """

    def issued(self, unit: int, event: Any) -> None:
        """Note that the copy was enqueued; `event` happens when it is over."""

    def reads_directly(self, unit: int) -> bool:
        """Whether the unit goes from the disk to the device without host memory."""

    def read_into(self, unit: int, buffer: torch.Tensor) -> int:
        """Read such a unit into device memory, wait until it is there, and return its bytes."""


def cut_up(pieces: Pieces, nbytes: int) -> list[tuple[int, np.ndarray]]:
    """Return the same bytes for the same places, at most `nbytes` at a time."""
    return [
        (at + start, data[start : start + nbytes])
        for at, data in pieces
        for start in range(0, data.nbytes, nbytes)
    ]
