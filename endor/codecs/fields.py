"""Codec `fields`: tensors of other quantised formats, the symbols in them entropy-coded.

A word of a quantised checkpoint holds several codes, or a block holds codes and scales; bytes as
they lie there have no distribution worth coding. `Layout` says where the symbols are, and these are
coded as codec `int` codes its own (`endor.codecs.rans`), one table a field.
"""

from collections.abc import Callable, Iterable

import numpy as np

from endor.codecs import rans
from endor.codecs.coding import CHUNK, LANES, MAX_WORDS, SCALE
from endor.codecs.dtypes import DType
from endor.codecs.layout import Fields, Layout, Part
from endor.codecs.planning import CodePlan, normalised
from endor.codecs.spec import Encoded, TensorSpec
from endor.errors import ShapeError

MIN_NBYTES = 4096
"""Smaller tensors are not looked at: states and tables take 640 bytes and more."""

PIECE_SYMBOLS = 1 << 21
"""Symbols in memory at a time, one byte each."""

Coder = Callable[[np.ndarray, CodePlan], tuple[np.ndarray, np.ndarray, np.ndarray]]
Decoder = Callable[[np.ndarray, np.ndarray, np.ndarray, np.ndarray, int], np.ndarray]

_PLAIN = {
    "U8": (4, 8),
    "I8": (4, 8),
    "F8_E4M3": (8,),
    "F8_E5M2": (8,),
    "F8_E4M3FNUZ": (8,),
    "F8_E5M2FNUZ": (8,),
    "F8_E8M0": (8,),
    "F4": (4,),
    "I16": (4, 8),
    "U16": (4, 8),
    "I32": (2, 4, 8),
    "U32": (2, 4, 8),
    "I64": (4, 8),
    "U64": (4, 8),
}


def layouts(dtype: DType) -> tuple[Layout, ...]:
    """Return the layouts that a tensor of `dtype` may have; none where it holds no packed codes."""
    return tuple(Layout(1, ((Part(0, 1, bits),),)) for bits in _PLAIN.get(dtype.name, ()))


def choose(raw: np.ndarray, candidates: Iterable[Layout]) -> Layout | None:
    """Return the layout in which `raw` takes the fewest bytes; None if that is as many as it has.

    Fields that are not worth their tables are left to the rest.

    Args:
        raw: u8, flat.
        candidates: Layouts whose blocks divide it.
    """
    best, least = None, 8.0 * raw.size
    for layout in candidates:
        blocks = raw.reshape(-1, layout.block)
        kept, bits = [], 8.0 * raw.size
        for at, field in enumerate(layout.fields):
            plain = layout.width(at) * layout.count(at, len(blocks))
            coded = _bits(_counts(layout, at, blocks))
            if coded < plain:
                kept.append(field)
                bits -= plain - coded
        if kept and bits < least:
            best, least = Layout(layout.block, tuple(kept)), bits
    return best


def _counts(layout: Layout, field: int, blocks: np.ndarray) -> np.ndarray:
    """Return how often each symbol of a field occurs, int64."""
    counts = np.zeros(1 << layout.width(field), dtype=np.int64)
    for start, stop in _pieces(layout, len(blocks)):
        symbols = layout.take(field, blocks[start:stop])
        counts += np.bincount(symbols, minlength=counts.size)
    return counts


def _bits(counts: np.ndarray) -> float:
    """Return the bits that a field with these counts of symbols takes, its table included."""
    frequencies = normalised(counts)
    used = counts > 0
    bits = float((counts[used] * np.log2(SCALE / frequencies[used])).sum())
    chunks = -(-int(counts.sum()) // CHUNK)
    # a state takes 32 bits and holds about 8 of information above its least
    return bits + chunks * (24 * LANES + 32) + 16 * counts.size


def _pieces(layout: Layout, blocks: int) -> Iterable[tuple[int, int]]:
    """Yield the blocks of each piece: whole chunks of every field, but for the last one."""
    least = layout.piece()
    symbols = sum(layout.count(field, least) for field in range(len(layout.fields)))
    step = least * max(1, PIECE_SYMBOLS // symbols)
    for start in range(0, blocks, step):
        yield start, min(start + step, blocks)


def encode(
    bits: np.ndarray,
    dtype: DType,
    layout: Layout,
    *,
    shape: tuple[int, ...] | None = None,
    coder: Coder = rans.code,
) -> Encoded | None:
    """Return a tensor in stored form; None where it has too many words for one.

    Args:
        bits: The elements, unsigned, C-contiguous.
        dtype: Their type.
        layout: Where the symbols are; its blocks divide the tensor.
        shape: In elements, where that is not the shape of `bits`.
        coder: Codes symbols.

    Raises:
        ShapeError: The blocks do not divide the tensor.
        FormatError: The layout is none.
    """
    layout.check()
    raw = bits.reshape(-1).view(np.uint8)
    if not raw.size or raw.size % layout.block:
        raise ShapeError(f"{raw.size} bytes are not whole blocks of {layout.block}")
    blocks = raw.reshape(-1, layout.block)
    tables: list[np.ndarray] = []
    states: list[np.ndarray] = []
    counts: list[np.ndarray] = []
    words: list[np.ndarray] = []
    for field in range(len(layout.fields)):
        frequencies = normalised(_counts(layout, field, blocks))
        plan = CodePlan(0, 0, frequencies, 0.0)
        for start, stop in _pieces(layout, len(blocks)):
            done = coder(layout.take(field, blocks[start:stop]), plan)
            for found, kept in zip(done, (states, counts, words), strict=True):
                kept.append(found)
        tables.append(frequencies.astype("<u2"))
    total = sum(part.size for part in words)
    if total > MAX_WORDS:
        return None
    arrays = {
        "frequencies": np.concatenate(tables),
        "chunk_offsets": rans.offsets_of(np.concatenate(counts)),
        "states": np.concatenate(states),
        "words": np.concatenate(words),
    }
    if layout.rest_nbytes():
        arrays["rest"] = np.ascontiguousarray(blocks[:, layout.rest()])
    size = bits.shape if shape is None else shape
    spec = TensorSpec(
        size, dtype, "fields", False, int(np.prod(size)), fields=Fields(layout, int(total))
    )
    return Encoded(spec, arrays)


def decode(
    encoded: Encoded,
    out: np.ndarray | None = None,
    start: int = 0,
    *,
    decoder: Decoder = rans.symbols_of,
) -> np.ndarray:
    """Return the flat elements, unsigned; or write some of the bytes to `out`.

    Args:
        encoded: Valid.
        out: u8, flat: as many bytes from `start` on as it has.
        start: First byte.
        decoder: Decodes symbols.

    Raises:
        FormatError: A chunk does not end as its coders began.
    """
    spec, arrays = encoded.spec, encoded.arrays
    assert spec.fields is not None
    layout = spec.fields.layout
    if out is None:
        whole = np.empty(spec.dense_nbytes, dtype=np.uint8)
        decode(encoded, whole, decoder=decoder)
        return whole.view(spec.dtype.uint)
    n_blocks, stop = spec.fields.blocks(spec.dense_nbytes), start + out.size
    first_chunks, tables = layout.chunks(n_blocks), _tables(layout, arrays["frequencies"])
    rest = layout.rest()
    for begin, end in _pieces(layout, n_blocks):
        low, high = max(start, begin * layout.block), min(stop, end * layout.block)
        if low >= high:
            continue
        blocks = np.empty((end - begin, layout.block), dtype=np.uint8)
        for field, table in enumerate(tables):
            at = first_chunks[field] + layout.count(field, begin) // CHUNK
            count = layout.count(field, end - begin)
            last = at + -(-count // CHUNK)
            symbols = decoder(
                table,
                arrays["chunk_offsets"][at : last + 1],
                arrays["states"][at:last],
                arrays["words"],
                count,
            )
            layout.put(field, symbols, blocks)
        if "rest" in arrays:
            blocks[:, rest] = arrays["rest"][begin:end]
        lead = begin * layout.block
        out[low - start : high - start] = blocks.reshape(-1)[low - lead : high - lead]
    return out


def _tables(layout: Layout, frequencies: np.ndarray) -> list[np.ndarray]:
    """Return the frequencies of each field."""
    ends = np.cumsum([1 << layout.width(field) for field in range(len(layout.fields))])
    return np.split(frequencies, ends[:-1])


def check(encoded: Encoded) -> None:
    """Raise `FormatError` unless frequencies, offsets and states are allowed.

    The words may be anything, as in codec `int`.
    """
    spec, arrays = encoded.spec, encoded.arrays
    assert spec.fields is not None
    for table in _tables(spec.fields.layout, arrays["frequencies"]):
        rans.check_frequencies(table)
    rans.check_offsets("chunk_offsets", arrays["chunk_offsets"], spec.fields.words)
    rans.check_states(arrays["states"])
