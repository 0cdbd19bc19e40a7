"""Which model stores integer codes in the fewest bits, from their histogram alone."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from endor.codecs.coding import MAX_SHIFT, MAX_SYMBOLS, SCALE

PATCH_BITS = 16 + 32

_REACH = 1 << 16
"""Codes further than half of this from the median are always patches."""

_RARE = (0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)
"""Counts up to which symbols are tried as patches: each symbol takes 1 of `SCALE` or more."""

Counter = Callable[[np.ndarray, int, int], np.ndarray]
"""Counts flat int32 codes as `count_codes` does."""

_UNIT = 1 << 16
_COST = np.concatenate([[0.0], np.log2(SCALE / np.arange(1, SCALE + 1))])
_COST = np.rint(_COST * _UNIT).astype(np.int64)
"""Bits of a symbol by its frequency, in 1/65536: integers, so that every machine decides alike."""


@dataclass(frozen=True, slots=True)
class CodePlan:
    """A model for integer codes; fields as in `Coding`.

    Attributes:
        base: Code of symbol 0, before the shift.
        shift: Uncoded low bits.
        frequencies: Of the symbols, int64; they sum to `SCALE`, none of them reaches it.
        bits: Predicted bits of symbols, low bits and patches.
    """

    base: int
    shift: int
    frequencies: np.ndarray
    bits: float

    @property
    def substitute(self) -> int:
        """The symbol that stands where a patch will be: the first of the most frequent."""
        return int(np.argmax(self.frequencies))

    def symbols_of(self, codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the symbol of each flat code, u8, and which codes need a patch, bool."""
        symbols = (codes >> np.int32(self.shift)) - np.int32(self.base)
        known = (symbols >= 0) & (symbols < self.frequencies.size)
        known &= self.frequencies[np.where(known, symbols, 0)] > 0
        return np.where(known, symbols, self.substitute).astype(np.uint8), ~known


def count_codes(codes: np.ndarray, low: int, size: int) -> np.ndarray:
    """Return how many of flat int32 `codes` are `low`, `low + 1`, ..., int64 `(size,)`."""
    places = codes - np.int32(low)
    return np.bincount(places[(places >= 0) & (places < size)], minlength=size)


def plan_code(codes: np.ndarray, count: Counter = count_codes) -> CodePlan:
    """Return the plan with the fewest bits for flat int32 `codes`; on a tie the smallest shift."""
    if not codes.size:
        return CodePlan(0, 0, normalised(np.ones(2, dtype=np.int64)), 0.0)
    low, counts, far = _histogram(codes, count)
    best = _plan(low, counts, far, 0)
    for shift in range(1, MAX_SHIFT + 1):  # the low bits of a narrow distribution are not noise
        plan = _plan(low, counts, far, shift)
        if plan.bits >= best.bits:
            break
        best = plan
    return best


def plan_levels(counts: np.ndarray) -> CodePlan:
    """Return the plan for codes that are numbers of levels, from how often each occurs."""
    kept = counts.astype(np.int64)
    if not kept.any():
        kept[:2] = 1
    frequencies = normalised(kept)
    bits = float((counts * _COST[frequencies]).sum()) / _UNIT
    return CodePlan(0, 0, frequencies, bits)


def _histogram(codes: np.ndarray, count: Counter) -> tuple[int, np.ndarray, int]:
    """Return the least code counted, the counts from it on, and the codes beyond reach."""
    low, high = int(codes.min()), int(codes.max())
    if high - low >= _REACH:
        middle = int(np.partition(codes, codes.size // 2)[codes.size // 2])
        low = middle - _REACH // 2
        high = low + _REACH - 1
    counts = count(codes, low, high - low + 1)
    return low, counts, codes.size - int(counts.sum())


def _plan(low: int, counts: np.ndarray, far: int, shift: int) -> CodePlan:
    base = low >> shift
    if shift:
        lead = low - (base << shift)
        padded = np.zeros(-(-(lead + counts.size) // (1 << shift)) << shift, dtype=np.int64)
        padded[lead : lead + counts.size] = counts
        counts = padded.reshape(-1, 1 << shift).sum(axis=1)
    start = 0
    if counts.size > MAX_SYMBOLS:
        sums = np.concatenate([[0], np.cumsum(counts)])
        start = int(np.argmax(sums[MAX_SYMBOLS:] - sums[:-MAX_SYMBOLS]))
    inside = counts[start : start + MAX_SYMBOLS].astype(np.int64)
    total = far + int(counts.sum())
    bits, frequencies = _fit(inside, total, shift)
    first = min(int(np.argmax(frequencies > 0)), frequencies.size - 2)
    last = max(int(np.flatnonzero(frequencies)[-1]), first + 1)
    return CodePlan(base + start + first, shift, frequencies[first : last + 1], bits)


def _fit(counts: np.ndarray, total: int, shift: int) -> tuple[float, np.ndarray]:
    """Return bits and frequencies of the best choice of symbols, the others being patches.

    Args:
        counts: Of the symbols of the window.
        total: Codes, those outside of the window included.
        shift: Low bits behind each symbol.
    """
    if counts.size < 2:
        counts = np.append(counts, 0)
    best: tuple[int, np.ndarray] | None = None
    previous = -1
    for rare in _RARE:
        kept = np.where(counts > rare, counts, 0)
        used = int(np.count_nonzero(kept))
        if used == previous:
            continue
        if not used:
            if best is not None:
                break
            kept[np.argmax(counts)] = 1
        previous = used
        frequencies = normalised(kept)
        patched = total - int(kept.sum())
        cost = int((kept * _COST[frequencies]).sum()) + total * shift * _UNIT
        cost += patched * (int(_COST[frequencies.max()]) + PATCH_BITS * _UNIT)
        if best is None or cost < best[0]:
            best = cost, frequencies
    assert best is not None
    return best[0] / _UNIT, best[1]


def normalised(counts: np.ndarray) -> np.ndarray:
    """Return frequencies close to `counts` that sum to `SCALE`: 0 for 0, else 1 to `SCALE - 1`."""
    counts = counts.copy()
    if np.count_nonzero(counts) == 1:  # a lone symbol would have all of the scale: lend one part
        at = int(np.argmax(counts))
        out = np.zeros_like(counts)
        out[at], out[at + 1 if at + 1 < counts.size else at - 1] = SCALE - 1, 1
        return out
    total = int(counts.sum())
    out, rest = np.divmod(counts * SCALE, total)
    out[(out == 0) & (counts > 0)] = 1
    spare = SCALE - int(out.sum())
    if spare > 0:
        order = np.argsort(-np.where(out * total < counts * SCALE, rest, 0), kind="stable")
        out[order[:spare]] += 1
    for _ in range(-spare):
        out[np.argmax(out)] -= 1
    return out
