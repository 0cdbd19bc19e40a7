"""Which prefix code stores integer codes in the fewest bits."""

from dataclasses import dataclass

import numpy as np

from endor.codecs.coding import MAX_SHIFT, PAIR_BITS
from endor.codecs.huffman import MAX_LENGTH, MAX_SYMBOLS, code_lengths

PATCH_BITS = 16 + 32
_REACH = 1 << 16
"""Codes further than half of this from the median are always patches."""

_RARE = (0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)
"""Counts up to which symbols are tried without a word: they crowd a code of limited length."""


@dataclass(frozen=True, slots=True)
class CodePlan:
    """A prefix code for integer codes; fields as in `Coding`.

    Attributes:
        base: Code of symbol 0, before the shift.
        shift: Uncoded low bits.
        pair: Whether a symbol is two codes.
        lengths: Bits of each symbol's word, u8, 0 where it has none.
        bits: Predicted bits of words, low bits and patches.
    """

    base: int
    shift: int
    pair: bool
    lengths: np.ndarray
    bits: int

    @property
    def substitute(self) -> int:
        """The symbol that stands where a patch will be: the first with the shortest word."""
        used = np.where(self.lengths > 0, self.lengths, 255)
        return int(np.argmin(used))

    def symbols_of(self, codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the symbol of each code (or pair), u8, and which codes need a patch, bool."""
        if self.pair:
            relative = codes - self.base
            inside = (relative >= 0) & (relative < 1 << PAIR_BITS)
            first, second = relative[0::2], relative[1::2]
            symbols = np.where(inside[0::2] & inside[1::2], first | second << PAIR_BITS, -1)
        else:
            symbols = (codes >> self.shift) - self.base
        known = (symbols >= 0) & (symbols < self.lengths.size)
        known &= self.lengths[np.where(known, symbols, 0)] > 0
        symbols = np.where(known, symbols, self.substitute).astype(np.uint8)
        if not self.pair:
            return symbols, ~known
        return symbols, self.codes_of(symbols) != codes

    def codes_of(self, symbols: np.ndarray) -> np.ndarray:
        """Return the codes that symbols stand for, int32, low bits 0."""
        wide = symbols.astype(np.int32)
        if self.pair:
            halves = (wide & ((1 << PAIR_BITS) - 1), wide >> PAIR_BITS)
            return np.stack(halves, axis=-1).reshape(-1) + np.int32(self.base)
        return (wide + np.int32(self.base)) << np.int32(self.shift)


def plan_code(codes: np.ndarray) -> CodePlan:
    """Return the plan with the fewest bits for flat int32 `codes`; on a tie the simplest."""
    if not codes.size:
        return CodePlan(0, 0, False, np.ones(1, dtype=np.uint8), 0)
    low, counts, far = _histogram(codes)
    best = _single(low, counts, far, 0)
    for shift in range(1, MAX_SHIFT + 1):  # the low bits of a narrow distribution are not noise
        plan = _single(low, counts, far, shift)
        if plan.bits >= best.bits:
            break
        best = plan
    if codes.size % 2 == 0:
        plan = _pairs(codes, low, counts)
        if plan.bits < best.bits:
            best = plan
    return best


def _histogram(codes: np.ndarray) -> tuple[int, np.ndarray, int]:
    """Return the least code counted, the counts from it on, and the codes beyond reach."""
    low, high = int(codes.min()), int(codes.max())
    if high - low >= _REACH:
        middle = int(np.partition(codes, codes.size // 2)[codes.size // 2])
        low = middle - _REACH // 2
        near = codes[(codes >= low) & (codes < low + _REACH)]
    else:
        near = codes
    counts = np.bincount(near - np.int32(low))
    return low, counts, codes.size - near.size


def _window(counts: np.ndarray, width: int) -> int:
    """Return where the `width` consecutive counts with the largest sum begin."""
    if counts.size <= width:
        return 0
    sums = np.concatenate([[0], np.cumsum(counts)])
    return int(np.argmax(sums[width:] - sums[:-width]))


def _single(low: int, counts: np.ndarray, far: int, shift: int) -> CodePlan:
    base = low >> shift
    if shift:
        lead = low - (base << shift)
        padded = np.zeros(-(-(lead + counts.size) // (1 << shift)) << shift, dtype=np.int64)
        padded[lead : lead + counts.size] = counts
        counts = padded.reshape(-1, 1 << shift).sum(axis=1)
    start = _window(counts, MAX_SYMBOLS)
    inside = counts[start : start + MAX_SYMBOLS]
    outside = far + int(counts.sum() - inside.sum())
    bits, lengths = _fit(inside, outside, shift, 1)
    first = int(np.argmax(lengths > 0))
    return CodePlan(base + start + first, shift, False, _trim(lengths[first:]), bits)


def _pairs(codes: np.ndarray, low: int, counts: np.ndarray) -> CodePlan:
    width = 1 << PAIR_BITS
    base = low + _window(counts, width)
    relative = codes - np.int32(base)
    inside = (relative >= 0) & (relative < width)
    both = inside[0::2] & inside[1::2]
    pairs = (relative[0::2] | relative[1::2] << PAIR_BITS)[both]
    joint = np.bincount(pairs, minlength=MAX_SYMBOLS)
    bits, lengths = _fit(joint, codes.size // 2 - pairs.size, 0, 2)
    return CodePlan(base, 0, True, _trim(lengths), bits)


def _trim(lengths: np.ndarray) -> np.ndarray:
    return lengths[: int(np.flatnonzero(lengths)[-1]) + 1]


def _fit(counts: np.ndarray, outside: int, shift: int, width: int) -> tuple[int, np.ndarray]:
    """Return bits and code lengths of the best choice of symbols that get a word.

    Args:
        counts: Of the symbols, one of them at least not 0 or all patched.
        outside: Symbols that must be patched anyway.
        shift: Low bits behind each word.
        width: Codes of a symbol.
    """
    counts = counts.astype(np.int64)
    total = int(counts.sum()) + outside
    if not counts.any():
        counts[0] = 1
    best: tuple[int, np.ndarray] | None = None
    previous = -1
    for rare in _RARE:
        kept = np.where(counts > rare, counts, 0)
        used = int(np.count_nonzero(kept))
        if used == previous or (not used and best is not None):
            continue
        if not used:
            kept[np.argmax(counts)] = 1
        previous = used
        lengths = code_lengths(kept)
        patched = total - int(kept.sum())
        shortest = int(lengths[lengths > 0].min())
        bits = int((kept * lengths).sum()) + patched * (shortest + width * PATCH_BITS)
        bits += total * shift
        if best is None or bits < best[0]:
            best = bits, lengths
        if used <= 2:
            break
    assert best is not None
    return best
