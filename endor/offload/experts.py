"""Which experts are worth their memory: those used often and lately."""

from collections.abc import Iterable
from math import exp2, inf, log2

HALF_LIFE = 64.0
"""Visits of a layer after which a use counts half; docs/benchmarks/experts.md compares others."""


class Popularity:
    """Values experts by their uses, each fading with age (LRFU: Lee et al., IEEE ToC 50, 2001).

    An expert's value is `log2(sum over its uses of 2 ** (-age / half_life))`, ages in visits of
    its own layer. It is stored as of visit 0, where it changes only with a use: values can then be
    compared at any moment without bringing them up to date.

    Args:
        half_life: Visits of a layer after which a use counts half. Short ones come close to LRU,
            long ones to LFU.
    """

    __slots__ = ("_values", "_visits", "half_life")

    def __init__(self, half_life: float = HALF_LIFE) -> None:
        self.half_life = half_life
        self._values: dict[int, float] = {}
        self._visits: dict[int, int] = {}

    def observe(self, group: int, experts: Iterable[int]) -> None:
        """Note that a layer routed to `experts`.

        Args:
            group: Names the layer.
            experts: Numbers that are unique over all layers.
        """
        visit = self._visits.get(group, 0) + 1
        self._visits[group] = visit
        now = visit / self.half_life
        for expert in experts:
            old = self._values.get(expert, -inf)
            # log2(2**old + 2**now), with the older and smaller term inside
            self._values[expert] = now + log2(1 + exp2(old - now))

    def visits(self, group: int) -> int:
        """Return how often a layer was visited."""
        return self._visits.get(group, 0)

    def value(self, expert: int) -> float:
        """Return what an expert is worth; minus infinity before its first use."""
        return self._values.get(expert, -inf)
