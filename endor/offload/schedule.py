"""The order in which streamed units are used, learned from what was used last."""

from collections.abc import Iterator, Sequence


class Schedule:
    """Predicts the next units from each unit's last observed successor.

    Decoding walks the same units in the same order for every token, so the order is a cycle and
    the prediction crosses the token boundary. It starts as the order of the file and is corrected
    by every step; a graph that takes another path once (an encoder before the first token, say)
    costs one wrong guess there and back.
    """

    __slots__ = ("_last", "_next")

    def __init__(self, order: Sequence[int]) -> None:
        self._next = dict(zip(order, [*order[1:], *order[:1]], strict=True))
        self._last: int | None = None

    @property
    def last(self) -> int | None:
        """The unit used last."""
        return self._last

    def observe(self, unit: int) -> bool:
        """Note that `unit` is used now; return whether it was the predicted one."""
        if unit not in self._next or unit == self._last:
            return True
        last, self._last = self._last, unit
        if last is None:
            return True
        expected = self._next[last]
        self._next[last] = unit
        return expected == unit

    def ahead(self) -> Iterator[int]:
        """Yield the units predicted to follow, nearest first, each once."""
        if not self._next:
            return
        seen = set()
        unit = next(iter(self._next)) if self._last is None else self._next[self._last]
        while unit not in seen:
            yield unit
            seen.add(unit)
            unit = self._next[unit]
