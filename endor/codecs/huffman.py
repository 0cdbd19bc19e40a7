"""Prefix codes of limited length, from counts alone.

A code is given by its lengths, as in Deflate (RFC 1951): code words of one length are consecutive
numbers in the order of symbols, shorter ones come first. A stream holds each word from its most
significant bit on, in bits numbered from the least significant, so that a decoder looks a symbol
up by the next `MAX_LENGTH` bits.
"""

import numpy as np

from endor.errors import FormatError

MAX_LENGTH = 12
"""Bits of the longest code word: a decoder's table has `2**MAX_LENGTH` entries."""

MAX_SYMBOLS = 256


def code_lengths(counts: np.ndarray, max_length: int = MAX_LENGTH) -> np.ndarray:
    """Return the lengths of the best code whose words have at most `max_length` bits.

    Package-merge (Larmore and Hirschberg, 1990). Equal counts give equal lengths on every machine.

    Args:
        counts: Occurrences of each symbol, int64, `(n,)`; a symbol with 0 gets no word.
        max_length: At least `log2` of the symbols that occur.

    Returns:
        u8 `(n,)`; 0 where there is no word. A lone symbol has 1 bit.
    """
    lengths = np.zeros(counts.size, dtype=np.uint8)
    used = np.flatnonzero(counts)
    if used.size < 2:
        lengths[used] = 1
        return lengths
    order = used[np.argsort(counts[used], kind="stable")]
    leaves = counts[order].astype(np.int64)
    merged, is_leaf = leaves, [np.ones(leaves.size, dtype=np.bool_)]
    for _ in range(max_length - 1):
        even = merged.size // 2 * 2
        both = np.concatenate([leaves, merged[:even:2] + merged[1:even:2]])
        rank = np.argsort(both, kind="stable")
        merged = both[rank]
        is_leaf.append(rank < leaves.size)
    needed = 2 * leaves.size - 2
    for level in reversed(is_leaf):
        taken = int(np.count_nonzero(level[:needed]))
        lengths[order[:taken]] += 1
        needed = 2 * (needed - taken)
    return lengths


def code_words(lengths: np.ndarray) -> np.ndarray:
    """Return the word of each symbol, u16, first bit lowest; 0 where there is none."""
    words = np.zeros(lengths.size, dtype=np.uint16)
    word, before = 0, 0
    for symbol in np.lexsort((np.arange(lengths.size), lengths)):
        length = int(lengths[symbol])
        if length:
            word <<= length - before
            words[symbol] = int(f"{word:0{length}b}"[::-1], 2)
            word, before = word + 1, length
    return words


def check_lengths(lengths: np.ndarray) -> None:
    """Raise `FormatError` unless these are the lengths of a complete code.

    Whatever bits follow, exactly one word matches. A lone symbol has one bit, of either value.
    """
    if not lengths.size or lengths.max() > MAX_LENGTH:
        raise FormatError(f"code_lengths must be 0..{MAX_LENGTH}, at least one of them not 0")
    used = lengths[lengths > 0]
    if used.size == 1 and used[0] == 1:
        return
    space = int((1 << (MAX_LENGTH - used.astype(np.int64))).sum())
    if space != 1 << MAX_LENGTH:
        raise FormatError(
            f"code_lengths must fill {1 << MAX_LENGTH} parts of the code space, got {space}"
        )


def decoding_table(lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return symbol and length, u8 `(2**MAX_LENGTH,)` each, by the next bits of the stream.

    Args:
        lengths: A complete code.
    """
    symbols = np.zeros(1 << MAX_LENGTH, dtype=np.uint8)
    bits = np.ones(1 << MAX_LENGTH, dtype=np.uint8)
    words = code_words(lengths)
    used = np.flatnonzero(lengths)
    if used.size == 1:
        symbols[:] = used[0]
        return symbols, bits
    for symbol in used:
        at = slice(int(words[symbol]), None, 1 << int(lengths[symbol]))
        symbols[at], bits[at] = symbol, lengths[symbol]
    return symbols, bits
