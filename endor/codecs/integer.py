"""Codec `int`: integer codes times steps, the codes entropy-coded.

The coder is range ANS (`endor.codecs.rans`) with 32-bit states and 16-bit words: 32 interleaved
coders of a chunk of 32768 codes share one stream of words, as in Giesen's `ryg_rans`, so that a
warp, or four AVX2 registers, decode 32 codes at a time. Entropy-coding the codes of a uniform grid
is the idea of EntroLLM (arXiv 2505.02380), EntQuant and WaterSIC;
docs/decisions/0001-integer-codes.md says what else was tried.
"""

from collections.abc import Mapping

import numpy as np

from endor.codecs import rans
from endor.codecs.codes import check_codes, check_levels, low_bits_of
from endor.codecs.coding import (
    CHUNK,
    LANES,
    MAX_CODE,
    MAX_WORDS,
    VALUE_DTYPES,
    Coding,
    matrix_shape,
)
from endor.codecs.dtypes import DType
from endor.codecs.planning import CodePlan, Counter, count_codes, plan_code, plan_levels
from endor.codecs.spec import MAX_NNZ, Encoded, TensorSpec
from endor.codecs.steps import (
    check_steps,
    load_steps,
    round_steps,
    spread,
    steps_for,
    store_steps,
    to_dtype,
)
from endor.errors import ConfigError, DTypeError, FormatError

__all__ = [
    "check",
    "codes_of",
    "decode",
    "dense_of",
    "encode",
    "entropy_bits",
    "levels_of",
    "round_steps",
    "size_bits",
    "steps_of",
]


def encode(
    codes: np.ndarray,
    steps: np.ndarray | float,
    dtype: DType,
    *,
    shape: tuple[int, ...] | None = None,
    block: tuple[int, int] | None = None,
    levels: np.ndarray | None = None,
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
        levels: 2 to 256 finite float32 values; the codes are then numbers of these, and an element
            is `levels[code] * step`, rounded.

    Raises:
        DTypeError: The codes are no integers, or `dtype` is another type.
        ConfigError: A code, a level or a step is out of range.
        ShapeError: The shapes do not fit.
    """
    codes, values, block, plan = prepare(codes, steps, dtype, shape, block, levels=levels)
    flat = codes.reshape(-1)
    symbols, unknown = plan.symbols_of(flat)
    patched = np.flatnonzero(unknown)
    states, counts, words = rans.code(symbols, plan)
    low_bits = low_bits_of(flat, plan.shift, patched)
    return assemble(
        codes, dtype, plan, values, block, states, counts, words, patched, low_bits, levels
    )


def prepare(
    codes: np.ndarray,
    steps: np.ndarray | float,
    dtype: DType,
    shape: tuple[int, ...] | None,
    block: tuple[int, int] | None,
    count: Counter = count_codes,
    levels: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray, tuple[int, int], CodePlan]:
    """Return checked codes, steps and block, and the code to use; errors as for `encode`."""
    if dtype.name not in VALUE_DTYPES:
        raise DTypeError(f"codec int takes {', '.join(VALUE_DTYPES)}, not {dtype.name}")
    codes = check_codes(codes, shape)
    values, block = steps_for(steps, codes.shape, block)
    flat = codes.reshape(-1)
    if levels is None:
        return codes, values, block, plan_code(flat, count)
    check_levels(levels, values)
    if flat.size and not 0 <= int(flat.min()) <= int(flat.max()) < levels.size:
        raise ConfigError(f"codes must be numbers of {levels.size} levels")
    return codes, values, block, plan_levels(count(flat, 0, levels.size))


def assemble(
    codes: np.ndarray,
    dtype: DType,
    plan: CodePlan,
    steps: np.ndarray,
    block: tuple[int, int],
    states: np.ndarray,
    counts: np.ndarray,
    words: np.ndarray,
    patched: np.ndarray,
    low_bits: np.ndarray,
    levels: np.ndarray | None = None,
) -> Encoded:
    """Return the stored tensor around a finished stream.

    Args:
        states: u32 `(n_chunks, 32)`.
        counts: Words of each chunk, `(n_chunks,)`.
        words: u16, flat.
        patched: Indices of the codes that the stream does not hold, rising.
        low_bits: As `low_bits_of` returns them.
        levels: As for `encode`.
    """
    flat, at = codes.reshape(-1), patched
    for what, size in (("words", words.size), ("patches", at.size)):
        if size > min(MAX_WORDS, MAX_NNZ):
            raise ConfigError(f"{size} {what} exceed {MAX_WORDS}; split the tensor")
    name, exponent, stored = store_steps(steps)
    coding = Coding(
        plan.base,
        plan.frequencies.size,
        plan.shift,
        int(words.size),
        name,
        exponent,
        block,
        levels is not None,
    )
    spec = TensorSpec(
        codes.shape, dtype, "int", False, flat.size, patches=int(at.size), coding=coding
    )
    arrays = {
        "steps": stored.reshape(coding.step_shape(codes.shape)),
        "frequencies": plan.frequencies.astype("<u2"),
        **({} if levels is None else {"levels": levels.astype("<f4").view("<u4")}),
        "chunk_offsets": rans.offsets_of(counts),
        "states": states,
        "words": words,
    }
    if plan.shift:
        arrays["low_bits"] = low_bits
    if at.size:
        arrays |= {
            "patch_offsets": rans.offsets_of(np.bincount(at // CHUNK, minlength=counts.size)),
            "patch_ranks": (at % CHUNK).astype("<u2"),
            "patch_codes": flat[at].astype("<i4").view("<u4"),
        }
    return Encoded(spec, arrays)


def codes_of(encoded: Encoded) -> np.ndarray:
    """Return the codes, int32, of the tensor's shape; `encoded` must be valid.

    Those of a tensor with levels are numbers of levels.

    Raises:
        FormatError: The codec has no codes, or a chunk does not end as its coders began.
    """
    spec, arrays = encoded.spec, encoded.arrays
    coding = spec.coding
    if coding is None:
        raise FormatError(f"codec {spec.codec} has no codes")
    symbols = rans.symbols_of(
        arrays["frequencies"],
        arrays["chunk_offsets"],
        arrays["states"],
        arrays["words"],
        spec.numel,
    )
    codes: np.ndarray = symbols.astype(np.int32)
    codes = (codes + np.int32(coding.base)) << np.int32(coding.shift)
    if coding.shift:
        flat = np.unpackbits(arrays["low_bits"], bitorder="little")
        bits = flat[: spec.numel * coding.shift].reshape(spec.numel, coding.shift)
        codes |= (bits.astype(np.int32) << np.arange(coding.shift, dtype=np.int32)).sum(
            axis=1, dtype=np.int32
        )
    if spec.patches:
        codes[_patched(spec, arrays)] = arrays["patch_codes"].view("<i4")
    return codes.reshape(spec.shape)


def steps_of(encoded: Encoded) -> np.ndarray:
    """Return the steps, float32, `(R, C)`: one for each block of rows and columns."""
    if encoded.spec.coding is None:
        raise FormatError(f"codec {encoded.spec.codec} has no steps")
    return load_steps(encoded.spec.coding, encoded.arrays["steps"])


def levels_of(encoded: Encoded) -> np.ndarray:
    """Return the levels, float32; `encoded` must have some."""
    levels: np.ndarray = encoded.arrays["levels"].view(np.float32)
    return levels


def decode(encoded: Encoded) -> np.ndarray:
    """Return the flat elements, unsigned."""
    spec = encoded.spec
    assert spec.coding is not None
    codes = codes_of(encoded).reshape(matrix_shape(spec.shape))
    numbers = levels_of(encoded)[codes] if spec.coding.levels else codes.astype(np.float32)
    with np.errstate(over="ignore"):
        values = numbers * spread(spec.coding, steps_of(encoded), spec.shape)
    return to_dtype(values, spec.dtype).reshape(-1)


def dense_of(
    codes: np.ndarray,
    steps: np.ndarray | float,
    dtype: DType,
    *,
    block: tuple[int, int] | None = None,
    levels: np.ndarray | None = None,
) -> np.ndarray:
    """Return the bits that decoding `encode(codes, steps, dtype)` gives; arguments as there."""
    values, block = steps_for(steps, codes.shape, block)
    coding = Coding(0, 2, 0, 0, "F32", 0, block)
    rows_cols = matrix_shape(codes.shape)
    numbers = codes.astype(np.float32) if levels is None else levels[codes]
    with np.errstate(over="ignore"):
        product = numbers.reshape(rows_cols) * spread(coding, values, codes.shape)
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

    Within 0.002 bits from 100,000 codes on: what the coders' last states hold is not counted but
    expected.

    Args:
        codes: As for `encode`.
        steps: As for `encode`; None counts 16 bits a column.
    """
    codes = check_codes(codes, None)
    if not codes.size:
        return 0.0
    plan = plan_code(codes.reshape(-1))
    n_chunks = -(-codes.size // CHUNK)
    # a state takes 32 bits and holds about 8 of information above its least
    bits = plan.bits + n_chunks * 24 * LANES + (n_chunks + 1) * 32 + 16 * plan.frequencies.size
    _, patched = plan.symbols_of(codes.reshape(-1))
    if patched.any():
        bits += 32 * (n_chunks + 1)
    if steps is None:
        bits += 16 * matrix_shape(codes.shape)[1]
    else:
        values, _ = steps_for(steps, codes.shape, None)
        bits += 8 * store_steps(values)[2].nbytes
    return bits / codes.size


def check(encoded: Encoded) -> None:
    """Raise `FormatError` unless frequencies, offsets, states, steps and patches are allowed.

    The words may be anything: they decode to something inside all buffers. Decoding finds nearly
    every change of them, since the coders do not end as they began; a checksum finds all.
    """
    spec, arrays = encoded.spec, encoded.arrays
    coding = spec.coding
    assert coding is not None
    rans.check_frequencies(arrays["frequencies"])
    check_steps(coding, arrays["steps"])
    if coding.levels:
        check_levels(levels_of(encoded), steps_of(encoded), FormatError)
    rans.check_offsets("chunk_offsets", arrays["chunk_offsets"], coding.words)
    rans.check_states(arrays["states"])
    if coding.shift and arrays["low_bits"].size:
        tail = np.unpackbits(arrays["low_bits"][-LANES // 8 * coding.shift :], bitorder="little")
        used = (spec.numel - 1) % LANES + 1
        if tail[used * coding.shift :].any():
            raise FormatError(f"low_bits past element {spec.numel} must be 0")
    if spec.patches:
        _check_patches(spec, arrays)


def _check_patches(spec: TensorSpec, arrays: Mapping[str, np.ndarray]) -> None:
    rans.check_offsets("patch_offsets", arrays["patch_offsets"], spec.patches)
    if (arrays["patch_ranks"] >= CHUNK).any():
        raise FormatError("a patch rank must lie inside its chunk")
    at = _patched(spec, arrays)
    if (np.diff(at) <= 0).any() or at[-1] >= spec.numel:
        raise FormatError("patch ranks must be strictly increasing, inside the tensor")
    values = arrays["patch_codes"].view("<i4").astype(np.int64)
    if (np.abs(values) > MAX_CODE).any():
        raise FormatError(f"patch_codes must lie within +-{MAX_CODE}")


def _patched(spec: TensorSpec, arrays: Mapping[str, np.ndarray]) -> np.ndarray:
    """Return the flat indices of the patched elements, int64."""
    counts: np.ndarray = np.diff(arrays["patch_offsets"].astype(np.int64))
    chunks = np.repeat(np.arange(counts.size, dtype=np.int64), counts)
    at: np.ndarray = chunks * CHUNK + arrays["patch_ranks"]
    return at
