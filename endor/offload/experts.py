"""Which experts are worth their memory: those used often and lately."""

from collections.abc import Iterable
from math import exp2, inf, log2

import numpy as np

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


def expected_uses(values: np.ndarray, visits: np.ndarray, half_life: float) -> np.ndarray:
    """Return the uses of experts that are to be expected while the present ones fade.

    A use takes `half_life / ln 2` visits on average to fade. In that window an expert that is used
    at a steady rate is used as often as the sum of its faded uses says.

    Args:
        values: Of `Popularity`.
        visits: How often the layer of each was visited.
        half_life: Of the same.
    """
    return np.exp2(values - visits / half_life)


def best_exchange(
    uses: np.ndarray, outside: np.ndarray, inside: np.ndarray, gain: float, *, empty: bool = False
) -> tuple[int, int, float] | None:
    """Return who comes, who goes and how many copies that saves, where it saves more than its own.

    Args:
        uses: Uses of each expert that are to be expected.
        outside: Numbers of those that may come.
        inside: Numbers of those that may go.
        gain: What one use saves, in times of a copy.
        empty: A place is free: nobody goes, and -1 stands for that.
    """
    if not outside.size or not (inside.size or empty):
        return None
    comes = int(outside[uses[outside].argmax()])
    goes = -1 if empty else int(inside[uses[inside].argmin()])
    saved = float(uses[comes] - (0.0 if empty else uses[goes])) * gain
    return (comes, goes, saved) if saved > 1.0 else None
