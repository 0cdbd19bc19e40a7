"""Bits for the matrices of a layer so that the last bit buys the same everywhere: equal slope.

A matrix whose steps have scale c adds `worth * c^2` a weight to the squared change of what the
layer puts out, and c falls by half for every bit. Bits are shared out best where an additional one
buys as much in each matrix (reverse water-filling; Cover and Thomas, section 10.3): where
`c * sqrt(worth)` is the same for all.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from endor.quantization.ecq import Ecq

OCTAVES = 3
"""How far from the scale of equal bits the size of a matrix is known, in factors of two."""

POINTS = 4
"""Known sizes in a factor of two."""

MOST_OFFSET_BITS = 0.75
"""Bits that a matrix may have more or fewer than the mean of its layer: sensitivities are those of
small changes."""


@dataclass(frozen=True, slots=True)
class Curve:
    """What a matrix takes at each scale.

    Attributes:
        numel: Weights.
        worth: What the square of the scale costs, a weight; 0 where it is not known.
        scales: Base-2 logarithms, rising.
        bits: A weight takes at these.
    """

    numel: int
    worth: float
    scales: tuple[float, ...]
    bits: tuple[float, ...]

    @classmethod
    def of(cls, problem: Ecq, numel: int, worth: float, bits: float) -> "Curve":
        """Return the curve of a matrix around the scale at which it takes `bits`."""
        middle = math.log2(problem.scale_for(bits))
        steps = range(-OCTAVES * POINTS, OCTAVES * POINTS + 1)
        scales = tuple(middle + step / POINTS for step in steps)
        return cls(numel, worth, scales, tuple(problem.estimate(2**scale) for scale in scales))

    def at(self, scale: float) -> float:
        """Return the bits at a scale, between the known ones on a line."""
        points = list(zip(self.scales, self.bits, strict=True))
        for (low, more), (high, fewer) in pairwise(points):
            if scale <= high:
                share = max(0.0, (scale - low) / (high - low))
                return more + share * (fewer - more)
        return self.bits[-1]


def share_out(curves: Mapping[str, Sequence[Curve]]) -> dict[str, float]:
    """Return for each tensor how many bits more (or fewer) a weight gets than the layer's mean.

    Args:
        curves: Of the matrices in each tensor, all made for the same bits.

    Returns:
        Offsets whose mean over weights is 0, within `MOST_OFFSET_BITS`; the matrices of one tensor
        get the same.
    """
    known = [one.worth for parts in curves.values() for one in parts if one.worth > 0]
    if not known:
        return dict.fromkeys(curves, 0.0)
    middle = len(next(iter(curves.values()))[0].scales) // 2
    sizes = {name: sum(one.numel for one in parts) for name, parts in curves.items()}
    even = {
        name: mean([(one.bits[middle], one.numel) for one in parts])
        for name, parts in curves.items()
    }
    total = sum(sizes.values())

    def offsets(level: float) -> dict[str, float]:
        found = {}
        for name, parts in curves.items():
            bits = [
                (one.at(level - math.log2(one.worth or min(known)) / 2), one.numel) for one in parts
            ]
            offset = mean(bits) - even[name]
            found[name] = min(max(offset, -MOST_OFFSET_BITS), MOST_OFFSET_BITS)
        return found

    low, high = -200.0, 200.0
    for _ in range(50):
        level = (low + high) / 2
        if sum(offset * sizes[name] for name, offset in offsets(level).items()) > 0:
            low = level
        else:
            high = level
    found = offsets(high)
    excess = sum(offset * sizes[name] for name, offset in found.items()) / total
    return {name: offset - excess for name, offset in found.items()}


def mean(parts: Sequence[tuple[float, int]]) -> float:
    """Return the mean of values, each with its weight."""
    return sum(value * count for value, count in parts) / sum(count for _, count in parts)
