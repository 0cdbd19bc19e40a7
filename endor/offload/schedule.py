"""The order in which streamed units are used, learned from what was used last."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Self


class Schedule:
    """Predicts the next units from each unit's last observed successor.

    Decoding walks the same units in the same order for every token, so the order is a cycle and
    the prediction crosses the token boundary. It starts as the order of the file and is corrected
    by every step; a graph that takes another path once (an encoder before the first token, say)
    costs one wrong guess there and back.

    Args:
        order: Units in the order of the file.
    """

    __slots__ = ("_expects", "_first", "_last", "_learns", "_next")

    def __init__(self, order: Sequence[int]) -> None:
        self._next = dict(zip(order, [*order[1:], *order[:1]], strict=True))
        self._first = order[0] if order else 0
        self._last: int | None = None
        self._learns = True
        self._expects = True

    def follower(self) -> Self:
        """Return a place of its own in this order, which learns nothing.

        For who fetches units ahead: what it does next is this order's prediction, so observing it
        says nothing of what is really used next. It may be read on another thread.
        """
        other = type(self)(())
        other._next, other._first, other._learns = self._next, self._first, False
        return other

    @property
    def last(self) -> int | None:
        """The unit used last."""
        return self._last

    def observe(self, unit: int) -> bool:
        """Note that `unit` is used now; return whether it was the predicted one."""
        if unit not in self._next or unit == self._last:
            return True
        last, self._last = self._last, unit
        self._expects = True
        if last is None:
            return True
        expected = self._next[last]
        if self._learns:
            self._next[last] = unit
        return expected == unit

    def forget(self, units: Iterable[int]) -> None:
        """Expect units no more until they are used again."""
        gone = set(units) & self._next.keys()
        rest = [unit for unit in self._next if unit not in gone]
        self._expects = bool(rest)
        if not rest:
            return
        if self._first in gone:
            self._first = rest[0]
        after = dict(zip(rest, [*rest[1:], rest[0]], strict=True))
        for unit in self._next:
            following, passed = self._next[unit], set[int]()
            while following in gone and following not in passed:
                passed.add(following)
                following = self._next[following]
            if following in gone:  # units that were used in a circle of their own
                following = after.get(unit, rest[0])
            self._next[unit] = following

    def ahead(self) -> Iterator[int]:
        """Yield the units predicted to follow, nearest first, each once."""
        if not self._next or not self._expects:
            return
        seen = set()
        unit = self._first if self._last is None else self._next[self._last]
        while unit not in seen:
            yield unit
            seen.add(unit)
            unit = self._next[unit]
