"""Codec `int`: integer codes times steps, the codes in a prefix code.

A tile is 1024 codes, each tile's code words stand for themselves: they begin at a byte of their own,
so that tiles decode independently. Entropy-coding a uniform grid is the idea of WaterSIC (2026),
EntQuant and EntroLLM (arXiv 2505.02380); docs/decisions/0001-integer-codes.md says why this code.
"""

import numpy as np

from endor.codecs.coding import MAX_CODE, MAX_STREAM, VALUE_DTYPES, Coding, matrix_shape
from endor.codecs.dtypes import DType
from endor.codecs.huffman import check_lengths, code_words, decoding_table
from endor.codecs.planning import CodePlan, plan_code
from endor.codecs.spec import GROUP, MAX_NNZ, TILE, Encoded, TensorSpec
from endor.codecs.steps import (
    check_steps,
    load_steps,
    round_steps,
    spread,
    steps_for,
    store_steps,
    to_dtype,
)
from endor.errors import ConfigError, DTypeError, FormatError, ShapeError

__all__ = [
    "check",
    "codes_of",
    "decode",
    "dense_of",
    "encode",
    "entropy_bits",
    "round_steps",
    "size_bits",
    "steps_of",
]

_TILES = GROUP // TILE
_OVERREAD = 8


def check_codes(codes: np.ndarray, shape: tuple[int, ...] | None) -> np.ndarray:
    """Return `codes` as C-contiguous int32 of `shape`.

    Raises:
        DTypeError: They are not integers.
        ConfigError: One exceeds 2**24 in magnitude.
        ShapeError: `shape` has another number of elements.
    """
    if codes.dtype.kind not in "iu":
        raise DTypeError(f"codes must be integers, got {codes.dtype}")
    if codes.size and (int(codes.min()) < -MAX_CODE or int(codes.max()) > MAX_CODE):
        raise ConfigError(f"codes must lie within +-{MAX_CODE}, got {codes.min()}..{codes.max()}")
    if shape is not None:
        if int(np.prod(shape, dtype=np.int64)) != codes.size:
            raise ShapeError(f"shape {shape} does not hold {codes.size} codes")
        codes = codes.reshape(shape)
    return np.ascontiguousarray(codes, dtype=np.int32).reshape(codes.shape)


def encode(
    codes: np.ndarray,
    steps: np.ndarray | float,
    dtype: DType,
    *,
    shape: tuple[int, ...] | None = None,
    block: tuple[int, int] | None = None,
) -> Encoded:
    """Return integer codes and their steps in stored form.

    An element is `float32(code) * step`, rounded to nearest even to `dtype`. A zero point belongs
    into the codes: store `code - zero`.

    Args:
        codes: Integers within +-2**24, any shape; rows are all dimensions but the last.
        steps: 0, or finite and at least 2**-126 in magnitude. `(cols,)` or `(1, cols)` is one a
            column, `(rows, 1)` one a row, a scalar one for all, `(rows, cols / 128)` one for 128
            columns of a row, and so on: each axis is divided into equal parts. Stored exactly, in
            16 bits where they came from `round_steps`.
        dtype: BF16, F16 or F32.
        shape: Shape of the tensor, when `codes` is flat.
        block: Rows and columns that share a step, where they do not divide the shape.

    Raises:
        DTypeError: The codes are no integers, or `dtype` is another type.
        ConfigError: A code or a step is out of range.
        ShapeError: The shapes do not fit.
    """
    codes, values, block, plan = prepare(codes, steps, dtype, shape, block)
    flat = codes.reshape(-1)
    symbols, patched = plan.symbols_of(flat)
    low = flat & np.int32((1 << plan.shift) - 1)
    low[patched] = 0
    words = code_words(plan.lengths)[symbols].astype(np.uint32)
    lengths = plan.lengths[symbols].astype(np.int64)
    words |= low.astype(np.uint32) << lengths.astype(np.uint32) if plan.shift else np.uint32(0)
    lengths += plan.shift
    tile = TILE // 2 if plan.pair else TILE
    starts, ends = _positions(lengths, tile)
    total = int(ends[-1]) if ends.size else 0
    bits = np.zeros(8 * total, dtype=np.uint8)
    for bit in range(int(lengths.max(initial=0))):
        has = lengths > bit
        bits[starts[has] + bit] = words[has] >> np.uint32(bit) & np.uint32(1)
    stream = np.packbits(bits, bitorder="little")
    return assemble(codes.shape, dtype, plan, values, block, stream, ends, flat, patched)


def prepare(
    codes: np.ndarray,
    steps: np.ndarray | float,
    dtype: DType,
    shape: tuple[int, ...] | None,
    block: tuple[int, int] | None,
) -> tuple[np.ndarray, np.ndarray, tuple[int, int], CodePlan]:
    """Return checked codes, steps and block, and the code to use; errors as for `encode`."""
    if dtype.name not in VALUE_DTYPES:
        raise DTypeError(f"codec int takes {', '.join(VALUE_DTYPES)}, not {dtype.name}")
    codes = check_codes(codes, shape)
    values, block = steps_for(steps, codes.shape, block)
    return codes, values, block, plan_code(codes.reshape(-1))


def assemble(
    shape: tuple[int, ...],
    dtype: DType,
    plan: CodePlan,
    steps: np.ndarray,
    block: tuple[int, int],
    stream: np.ndarray,
    ends: np.ndarray,
    codes: np.ndarray,
    patched: np.ndarray,
) -> Encoded:
    """Return the stored tensor around a finished stream.

    Args:
        stream: u8, flat.
        ends: First byte after each tile's words, `(n_tiles,)`.
        codes: All codes, flat int32.
        patched: Which of them the stream does not hold: flat bool, or their indices, rising.
    """
    if stream.size > MAX_STREAM:
        raise ConfigError(f"stream of {stream.size} bytes exceeds {MAX_STREAM}; split the tensor")
    at = np.flatnonzero(patched) if patched.dtype == np.bool_ else patched
    if at.size > MAX_NNZ:
        raise ConfigError(f"{at.size} patches exceed {MAX_NNZ}; split the tensor")
    name, exponent, stored = store_steps(steps)
    coding = Coding(
        plan.base,
        plan.lengths.size,
        plan.shift,
        plan.pair,
        int(stream.size),
        name,
        exponent,
        block,
    )
    numel = codes.size
    spec = TensorSpec(shape, dtype, "int", False, numel, patches=int(at.size), coding=coding)
    begins = np.concatenate([[0], ends]).astype(np.int64)
    group_offsets = np.append(begins[:-1:_TILES], begins[-1])
    of_group = np.repeat(group_offsets[:-1], _TILES)[: spec.n_tiles]
    arrays = {
        "steps": stored.reshape(coding.step_shape(shape)),
        "code_lengths": plan.lengths,
        "group_offsets": group_offsets.astype("<u4"),
        "tile_starts": (begins[:-1] - of_group).astype("<u2"),
        "stream": stream,
    }
    if at.size:
        counts = np.bincount(at // GROUP, minlength=spec.n_groups)
        offsets = np.zeros(spec.n_groups + 1, dtype="<u4")
        np.cumsum(counts, out=offsets[1:])
        arrays |= {
            "patch_offsets": offsets,
            "patch_ranks": (at % GROUP).astype("<u2"),
            "patch_codes": codes[at].astype("<i4").view("<u4"),
        }
    return Encoded(spec, arrays)


def codes_of(encoded: Encoded) -> np.ndarray:
    """Return the codes, int32, of the tensor's shape; `encoded` must be valid.

    Raises:
        FormatError: A tile's code words do not end where the tile does.
    """
    spec, arrays = encoded.spec, encoded.arrays
    coding = spec.coding
    if coding is None:
        raise FormatError(f"codec {spec.codec} has no codes")
    plan = CodePlan(coding.base, coding.shift, coding.pair, arrays["code_lengths"], 0)
    begins, ends = tile_bytes(spec, arrays["group_offsets"], arrays["tile_starts"])
    width = 2 if coding.pair else 1
    per_tile = TILE // width
    table, lengths = decoding_table(plan.lengths)
    padded = np.zeros(arrays["stream"].size + per_tile * 3 + _OVERREAD, dtype=np.uint32)
    padded[: arrays["stream"].size] = arrays["stream"]
    words = padded[:-3] | padded[1:-2] << 8 | padded[2:-1] << 16 | padded[3:] << 24
    at = begins * 8
    symbols = np.empty((per_tile, spec.n_tiles), dtype=np.uint8)
    low = np.zeros((per_tile, spec.n_tiles), dtype=np.int32) if coding.shift else None
    final = np.zeros(spec.n_tiles, dtype=np.int64)
    counts = np.full(spec.n_tiles, per_tile)
    if spec.n_tiles:
        counts[-1] = (spec.numel - TILE * (spec.n_tiles - 1)) // width
    for i in range(per_tile):
        window = words[at >> 3] >> (at & 7).astype(np.uint32)
        index = window & np.uint32(table.size - 1)
        symbols[i] = table[index]
        length = lengths[index].astype(np.int64)
        if low is not None:
            low[i] = window >> length.astype(np.uint32) & np.uint32((1 << coding.shift) - 1)
        at = at + length + coding.shift
        np.minimum(at, 8 * (padded.size - 4), out=at)
        np.copyto(final, at, where=counts == i + 1)
    wrong = np.flatnonzero(-(-final // 8) != ends)
    if wrong.size:
        tile = int(wrong[0])
        raise FormatError(
            f"tile {tile}: its code words must end in byte {int(ends[tile]) - 1} of the stream, "
            f"they end in byte {int(-(-final[tile] // 8)) - 1}"
        )
    codes = plan.codes_of(symbols.T.reshape(-1))
    if low is not None:
        codes |= low.T.reshape(-1)
    codes = codes[: spec.numel]
    if spec.patches:
        per_group: np.ndarray = np.diff(arrays["patch_offsets"].astype(np.int64))
        group = np.repeat(np.arange(spec.n_groups, dtype=np.int64), per_group)
        codes[group * GROUP + arrays["patch_ranks"]] = arrays["patch_codes"].view("<i4")
    return codes.reshape(spec.shape)


def steps_of(encoded: Encoded) -> np.ndarray:
    """Return the steps, float32, `(R, C)`: one for each block of rows and columns."""
    if encoded.spec.coding is None:
        raise FormatError(f"codec {encoded.spec.codec} has no steps")
    return load_steps(encoded.spec.coding, encoded.arrays["steps"])


def decode(encoded: Encoded) -> np.ndarray:
    """Return the flat elements, unsigned."""
    spec = encoded.spec
    assert spec.coding is not None
    codes = codes_of(encoded).reshape(matrix_shape(spec.shape))
    with np.errstate(over="ignore"):
        values = codes.astype(np.float32) * spread(spec.coding, steps_of(encoded), spec.shape)
    return to_dtype(values, spec.dtype).reshape(-1)


def dense_of(
    codes: np.ndarray,
    steps: np.ndarray | float,
    dtype: DType,
    *,
    block: tuple[int, int] | None = None,
) -> np.ndarray:
    """Return the bits that decoding `encode(codes, steps, dtype)` gives; arguments as there."""
    values, block = steps_for(steps, codes.shape, block)
    coding = Coding(0, 1, 0, False, 0, "F32", 0, block)
    rows_cols = matrix_shape(codes.shape)
    with np.errstate(over="ignore"):
        product = codes.reshape(rows_cols).astype(np.float32) * spread(coding, values, codes.shape)
    return to_dtype(product, dtype).reshape(codes.shape)


def entropy_bits(codes: np.ndarray) -> float:
    """Return the entropy of the distribution of `codes`, bits a code; 0 of none."""
    if not codes.size:
        return 0.0
    flat = codes.reshape(-1)
    low, high = int(flat.min()), int(flat.max())
    counts = np.bincount(flat - low) if high - low < 1 << 20 else np.unique_counts(flat).counts
    shares = counts[counts > 0] / codes.size
    return float(-(shares * np.log2(shares)).sum())


def size_bits(codes: np.ndarray, steps: np.ndarray | float | None = None) -> float:
    """Return the stored bits a weight that `encode` would need, from the histogram of `codes`.

    Within 0.002 bits from 100,000 codes on: how the words of a tile fill their last byte is not
    counted but expected.

    Args:
        codes: As for `encode`.
        steps: As for `encode`; None counts 16 bits a column.
    """
    codes = check_codes(codes, None)
    if not codes.size:
        return 0.0
    plan = plan_code(codes.reshape(-1))
    n_tiles, n_groups = -(-codes.size // TILE), -(-codes.size // GROUP)
    bits = plan.bits + n_tiles * (16 + 3.5) + (n_groups + 1) * 32 + 8 * plan.lengths.size
    _, patched = plan.symbols_of(codes.reshape(-1))
    if patched.any():
        bits += 32 * (n_groups + 1)
    if steps is None:
        bits += 16 * matrix_shape(codes.shape)[1]
    else:
        values, _ = steps_for(steps, codes.shape, None)
        bits += 8 * store_steps(values)[2].nbytes
    return bits / codes.size


def tile_bytes(
    spec: TensorSpec, group_offsets: np.ndarray, tile_starts: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return the first byte of each tile in the stream and the first after it, int64."""
    of_group = np.repeat(group_offsets[:-1].astype(np.int64), _TILES)[: spec.n_tiles]
    begins = of_group + tile_starts
    return begins, np.append(begins[1:], group_offsets[-1:].astype(np.int64))[: spec.n_tiles]


def check(encoded: Encoded) -> None:
    """Raise `FormatError` unless table, offsets, steps and patches are what the format allows.

    The stream may hold anything: every bit string decodes to something, inside its buffers.
    """
    spec, arrays = encoded.spec, encoded.arrays
    coding = spec.coding
    assert coding is not None
    check_lengths(arrays["code_lengths"])
    check_steps(coding, arrays["steps"])
    offsets, starts = arrays["group_offsets"].astype(np.int64), arrays["tile_starts"]
    if offsets[0] != 0 or offsets[-1] != coding.stream_nbytes or (np.diff(offsets) < 0).any():
        raise FormatError(f"group_offsets must rise from 0 to {coding.stream_nbytes}")
    if starts[::_TILES].any():
        raise FormatError("tile_starts must be 0 for the first tile of a group")
    begins, ends = tile_bytes(spec, arrays["group_offsets"], starts)
    wrong = np.flatnonzero(ends < begins)
    if wrong.size:
        raise FormatError(f"tile_starts must not fall, and tile {int(wrong[0])} must not be passed")
    if spec.patches:
        values = arrays["patch_codes"].view("<i4").astype(np.int64)
        if (np.abs(values) > MAX_CODE).any():
            raise FormatError(f"patch_codes must lie within +-{MAX_CODE}")


def _positions(lengths: np.ndarray, tile: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the first bit of each word, and the first byte after each tile, tiles in whole bytes."""
    n_tiles = -(-lengths.size // tile)
    padded = np.zeros(n_tiles * tile, dtype=np.int64)
    padded[: lengths.size] = lengths
    inside = np.cumsum(padded.reshape(n_tiles, tile), axis=1)
    nbytes = -(-inside[:, -1] // 8) if n_tiles else np.zeros(0, dtype=np.int64)
    ends = np.cumsum(nbytes)
    first = (8 * (ends - nbytes))[:, None] + inside - padded.reshape(n_tiles, tile)
    return first.reshape(-1)[: lengths.size], ends
