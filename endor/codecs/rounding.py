"""Rounding a tensor to integer codes of a wanted size, with nothing known but its values.

One step for the whole tensor: then every element has the same squared error, which for codes that
are entropy-coded is the least error at their size.
"""

import math

import numpy as np

from endor.codecs.dtypes import DType
from endor.codecs.integer import entropy_bits, round_steps, size_bits
from endor.errors import ConfigError, DTypeError, QuantizationError

EXCHANGE = math.log(2) / 6
"""Squared error, in squared steps, that a bit is worth: -dD/dR, D = step² / 12, R = -log2 step."""

MOST_SHIFT = 0.4
"""A threshold between two codes moves by at most this many steps."""

MOST_CODE = 32767
"""Largest magnitude of a code that quantisers make: int16 holds it."""

LEAST_BITS, MOST_BITS = 1.5, 8.5
"""Between these lies what can be asked for."""

SAMPLE = 1 << 18
"""Elements that the search for a step looks at."""


def check_rate(bits: float) -> float:
    """Return `bits` if that is a size that can be asked for.

    Raises:
        ConfigError: it is not.
    """
    if not LEAST_BITS <= bits <= MOST_BITS:
        raise ConfigError(
            f"bits: must lie in {LEAST_BITS} to {MOST_BITS}, got {bits}; with fewer nothing usable "
            "is left, and with more packing without loss costs little more"
        )
    return bits


def threshold_shifts(counts: np.ndarray) -> np.ndarray:
    """Return by how many steps the threshold below each code size lies above the middle.

    Half of what the code costs more than the one below it, in bits, times their worth: a value goes
    to the code that is best for error and rate together.

    Args:
        counts: How many codes have the magnitude 0, 1, ...
    """
    each = counts.astype(np.float64)
    each[1:] /= 2  # a sign each
    lengths = -np.log2(np.maximum(each, 0.5) / max(each.sum(), 1.0))
    gains = np.diff(lengths, prepend=lengths[:1])
    shifts: np.ndarray = np.clip(EXCHANGE / 2 * gains, 0, MOST_SHIFT).astype(np.float32)
    return shifts


def round_to_bits(
    values: np.ndarray, bits: float, *, tolerance: float = 0.005
) -> tuple[np.ndarray, np.ndarray]:
    """Return int16 codes of the shape of `values`, and their step, float32 `(1, 1)`.

    Stored, they take `bits` an element within `tolerance`, all metadata counted, where the values
    can be coded so: a constant tensor takes less. Of a tiny one, which is mostly metadata, the
    entropy of the codes is what is asked for.

    Args:
        values: float32, any shape.
        bits: See `check_rate`.
        tolerance: In bits.

    Raises:
        ConfigError: `bits` is out of range.
        QuantizationError: A value is not finite.
    """
    check_rate(bits)
    flat = np.ascontiguousarray(values, dtype=np.float32).reshape(-1)
    if not np.isfinite(flat).all():
        raise QuantizationError("values must be finite to be quantised; found NaN or infinity")
    peak = float(np.abs(flat).max(initial=0.0))
    if peak == 0.0:
        return np.zeros(values.shape, dtype=np.int16), np.zeros((1, 1), dtype=np.float32)
    sample = flat[:: max(1, flat.size // SAMPLE)]
    high = min(math.log2(peak) + 2, 127.0)
    # A step is rounded to 11 bits, and must be normal in float32.
    low = min(max(math.log2(peak / MOST_CODE) + 2**-10, -126.0), high)

    def codes_at(exponent: float, of: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        step = round_steps(np.full((1, 1), 2.0**exponent))
        return _round(of, sample, float(step[0, 0])), step

    def size_of(found: tuple[np.ndarray, np.ndarray]) -> float:
        return entropy_bits(found[0]) if tiny else size_bits(*found)

    found = codes_at(high, flat)  # all zero: tables and offsets are what they take
    tiny = size_bits(*found) > bits / 2
    best = (abs(size_of(found) - bits), found)
    sampled = sample.size < flat.size
    for attempt in range(32):
        middle = (low + high) / 2
        rough = sampled and attempt < 12
        found = codes_at(middle, sample if rough else flat)
        size = size_of(found)
        if rough:
            if abs(size - bits) <= tolerance:
                low, high, sampled = middle - 0.1, middle + 0.1, False
                continue
        elif abs(size - bits) <= best[0]:  # of equal ones the finer
            best = (abs(size - bits), found)
            if best[0] <= tolerance:
                break
        if size > bits:
            low = middle
        else:
            high = middle
    codes, step = best[1]
    return codes.reshape(values.shape), step


def _round(values: np.ndarray, sample: np.ndarray, step: float) -> np.ndarray:
    plain = np.minimum(np.abs(sample) / np.float32(step) + np.float32(0.5), MOST_CODE)
    shifts = threshold_shifts(np.bincount(plain.astype(np.int32)))
    sizes = np.abs(values) / np.float32(step) + np.float32(0.5)
    nearest = np.minimum(sizes, len(shifts) - 1).astype(np.int32)
    sizes -= shifts[nearest]
    codes: np.ndarray = np.minimum(np.floor(sizes), MOST_CODE).astype(np.int16)
    np.negative(codes, out=codes, where=values < 0)
    return codes


def floats_of(bits: np.ndarray, dtype: DType) -> np.ndarray:
    """Return the values, float32, of elements of `dtype` given as unsigned integers.

    Raises:
        DTypeError: `dtype` is not BF16, F16 or F32.
    """
    if dtype.name == "F32":
        return bits.view(np.float32)
    if dtype.name == "F16":
        return bits.view(np.float16).astype(np.float32)
    if dtype.name != "BF16":
        raise DTypeError(f"codes stand for BF16, F16 or F32, not {dtype.name}")
    wide: np.ndarray = bits.astype(np.uint32) << np.uint32(16)
    return wide.view(np.float32)
