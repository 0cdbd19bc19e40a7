"""Range ANS of 32 interleaved lanes a chunk: symbols to words and back, the numpy reference.

The coder is Duda's (arXiv 1311.2540), the interleaving Giesen's (arXiv 1402.3392); docs/format.md
says what a chunk holds. Codecs `int` and `fields` store symbols so.
"""

import numpy as np

from endor.codecs.coding import CHUNK, LANES, LOWEST, SCALE, SCALE_BITS
from endor.codecs.planning import CodePlan
from endor.errors import FormatError

_ROWS = CHUNK // LANES


def code(symbols: np.ndarray, plan: CodePlan) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return states, words of each chunk, and words, all chunks in step, from the last row back.

    Args:
        symbols: u8, flat, each with a frequency.
        plan: The frequencies, and the symbol that stands behind the last one.
    """
    n_chunks = -(-symbols.size // CHUNK)
    n_rows = -(-symbols.size // LANES)
    padded = np.full(n_chunks * CHUNK, plan.substitute, dtype=np.uint8)
    padded[: symbols.size] = symbols
    grid = padded.reshape(n_chunks, _ROWS, LANES)
    frequencies = plan.frequencies.astype(np.uint32)
    starts = (np.cumsum(frequencies) - frequencies).astype(np.uint32)
    states = np.full((n_chunks, LANES), LOWEST, dtype=np.uint32)
    leaves = np.zeros(grid.shape, dtype=np.bool_)
    words = np.zeros(grid.shape, dtype=np.uint16)
    for row in range(_ROWS - 1, -1, -1):
        live = n_chunks if (n_chunks - 1) * _ROWS + row < n_rows else n_chunks - 1
        x, symbol = states[:live], grid[:live, row]
        frequency = frequencies[symbol]
        out = x >= frequency << np.uint32(32 - SCALE_BITS)
        leaves[:live, row], words[:live, row] = out, x & np.uint32(0xFFFF)
        x = np.where(out, x >> np.uint32(16), x)
        quotient, rest = np.divmod(x, frequency)
        states[:live] = (quotient << np.uint32(SCALE_BITS)) + rest + starts[symbol]
    return states, leaves.sum(axis=(1, 2)), words[leaves]


def symbols_of(
    frequencies: np.ndarray,
    chunk_offsets: np.ndarray,
    states: np.ndarray,
    words: np.ndarray,
    count: int,
) -> np.ndarray:
    """Return `count` symbols, u8, flat.

    Args:
        frequencies: Of the symbols; checked.
        chunk_offsets: `(n_chunks + 1,)` into `words`, rising.
        states: u32 `(n_chunks, 32)`.
        words: u16, of these chunks and others.
        count: Of symbols; the last chunk may be shorter than the others.

    Raises:
        FormatError: A chunk does not end as its coders began.
    """
    frequencies = frequencies.astype(np.uint32)
    table = np.repeat(np.arange(frequencies.size, dtype=np.uint8), frequencies)
    bias = np.arange(SCALE, dtype=np.uint32) - (np.cumsum(frequencies) - frequencies)[table]
    factor = frequencies[table]
    words = np.append(words, np.zeros(LANES, dtype=np.uint16))
    offsets = chunk_offsets.astype(np.int64)
    n_chunks, n_rows = offsets.size - 1, -(-count // LANES)
    symbols = np.zeros((n_chunks, _ROWS, LANES), dtype=np.uint8)
    states, at = states.copy(), offsets[:-1].copy()
    for row in range(_ROWS):
        live = n_chunks if (n_chunks - 1) * _ROWS + row < n_rows else n_chunks - 1
        slot = states[:live] & np.uint32(SCALE - 1)
        symbols[:live, row] = table[slot]
        x = factor[slot] * (states[:live] >> np.uint32(SCALE_BITS)) + bias[slot].astype(np.uint32)
        need = x < LOWEST
        index = at[:live, None] + np.cumsum(need, axis=1) - 1
        word = words[np.where(need, np.minimum(index, words.size - 1), 0)]
        states[:live] = np.where(need, x << np.uint32(16) | word, x)
        at[:live] += need.sum(axis=1)
    wrong = np.flatnonzero((at != offsets[1:]) | (states != LOWEST).any(axis=1))
    if wrong.size:
        raise FormatError(
            f"chunk {int(wrong[0])}: its coders must end in state {LOWEST} with its last word; "
            "states, words or frequencies are damaged"
        )
    return symbols.reshape(-1)[:count]


def check_frequencies(frequencies: np.ndarray) -> None:
    """Raise `FormatError` unless the frequencies of one table are allowed."""
    wide = frequencies.astype(np.int64)
    if int(wide.sum()) != SCALE or wide.max() >= SCALE:
        raise FormatError(
            f"frequencies must sum to {SCALE} and stay below it, got {int(wide.sum())}"
        )


def check_states(states: np.ndarray) -> None:
    """Raise `FormatError` unless decoding can start from `states`."""
    if (states < LOWEST).any():
        raise FormatError(f"states must be at least {LOWEST}")


def check_offsets(name: str, offsets: np.ndarray, last: int) -> None:
    """Raise `FormatError` unless `offsets` rise from 0 to `last`."""
    if offsets[0] != 0 or offsets[-1] != last or (offsets[1:] < offsets[:-1]).any():
        raise FormatError(f"{name} must rise from 0 to {last}")


def offsets_of(counts: np.ndarray) -> np.ndarray:
    """Return where each of some parts of these sizes begins, and the end of the last one, u32."""
    out = np.zeros(counts.size + 1, dtype="<u4")
    np.cumsum(counts, out=out[1:])
    return out
