"""Units whose rows two processors share: the first ones are copied, the host multiplies the rest.

    stored    | rows 0 .. cut | rows cut .. n |      of each matrix of the unit
    device      copied, multiplied
    host                        multiplied where they lie, from row `cut` on

The rows that are copied are a stored matrix of their own (`endor.codecs.prefix`): ranges of each
array, from its beginning on. They are a copier's unit beside the whole one, which many rows need.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from endor.codecs import TensorSpec
from endor.codecs.prefix import prefix, row_step
from endor.offload.state import Bound
from endor.planning.tiers import Placement
from endor.planning.units import Unit
from endor.storage.layout import ARRAY_ALIGN, align_up


@dataclass(frozen=True, slots=True)
class Cut:
    """The rows of a unit that are copied.

    Attributes:
        pieces: Where in a slot which bytes go, in order.
        tensors: Spec of each stored tensor's rows, and where in the slot its arrays begin.
        nbytes: Bytes that are copied.
    """

    pieces: tuple[tuple[int, np.ndarray], ...]
    tensors: Mapping[str, tuple[TensorSpec, Mapping[str, int]]]
    nbytes: int


class RowSplit:
    """How the units in tier `host` are shared.

    Args:
        units: All units.
        placement: Their tiers, and the shares of the host.
    """

    def __init__(self, units: Sequence[Unit], placement: Placement) -> None:
        self._rows: dict[int, dict[str, int]] = {}
        self._cuts: dict[int, tuple[Bound, Cut]] = {}
        self._count = len(units)
        for unit in units:
            share = placement.host_shares.get(unit.name, 1.0)
            if placement.tiers[unit.name] == "host" and share < 1.0:
                rows = {
                    name: copied_rows(unit.layout.tensors[name].spec, 1.0 - share)
                    for name in unit.tensors
                }
                if any(rows.values()):
                    self._rows[unit.index] = rows

    def __contains__(self, unit: Unit) -> bool:
        return unit.index in self._rows

    def number(self, unit: Unit) -> int:
        """Return what a copier calls the first rows of a unit; the whole one has its index."""
        return self._count + unit.index

    def whole(self, number: int) -> int | None:
        """Return the index of the unit whose first rows `number` is; None for a whole unit's."""
        return number - self._count if number >= self._count else None

    def rows(self, unit: Unit, tensor: str) -> int:
        """Return how many rows of a stored tensor are copied."""
        rows = self._rows.get(unit.index)
        return rows[tensor] if rows is not None else 0

    def copied_bytes(self, unit: Unit) -> int:
        """Return the bytes that are copied of a unit, once it was cut."""
        known = self._cuts.get(unit.index)
        return known[1].nbytes if known is not None else 0

    def cut(self, unit: Unit, bound: Bound) -> Cut:
        """Return the rows of a unit that are copied, as views of its tensors in memory.

        Any thread may ask: what two of them make at once is the same.
        """
        known = self._cuts.get(unit.index)
        if known is None or known[0] is not bound:
            known = self._cuts[unit.index] = (bound, self._cut(unit, bound))
        return known[1]

    def _cut(self, unit: Unit, bound: Bound) -> Cut:
        pieces: list[tuple[int, np.ndarray]] = []
        tensors, end = {}, 0
        for name, rows in self._rows[unit.index].items():
            found, offsets = prefix(bound[name], rows), {}
            for suffix, parts in found.pieces.items():
                offsets[suffix], at = end, end
                for part in parts:
                    if part.nbytes:
                        pieces.append((at, part))
                    at += part.nbytes
                end = align_up(at, ARRAY_ALIGN)
            tensors[name] = (found.spec, offsets)
        return Cut(tuple(pieces), tensors, sum(data.nbytes for _, data in pieces))


def copied_rows(spec: TensorSpec, share: float) -> int:
    """Return about `share` of the rows of a stored matrix, where it can be cut."""
    if len(spec.shape) != 2:
        return 0
    rows = spec.shape[0]
    wanted, step = share * rows, row_step(spec)
    below = int(wanted // step) * step if step else 0
    places = (below, min(below + step, rows), rows) if step else (0, rows)
    return min(places, key=lambda at: abs(at - wanted))
