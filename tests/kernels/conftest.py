"""Elements that exercise every branch of the codecs."""

import numpy as np

from endor.codecs import DType

STYLES = ("noise", "window", "outliers", "specials")


def elements(
    rng: np.random.Generator, dtype: DType, n: int, density: float, style: str
) -> np.ndarray:
    """Return `n` elements as unsigned integers, a share `density` of them with some bit set."""
    span = 1 << dtype.exponent_bits
    exponents = rng.integers(span // 2 - span // 8, span // 2, n)
    if style == "noise":
        exponents = rng.integers(0, span, n)
    elif style == "outliers":
        exponents = np.where(rng.random(n) < 0.03, rng.integers(0, span, n), exponents)
    rests = rng.integers(0, 1 << dtype.rest_bits, n, dtype=np.uint64)
    bits = dtype.join(exponents, rests)
    if style == "specials" and n:
        top = dtype.uint.type(1 << (8 * dtype.itemsize - 1))
        field = dtype.uint.type((span - 1) << dtype.mantissa_bits)
        # -0.0, infinities, NaNs with payload, the smallest subnormal
        chosen = np.array([top, field, field | top, field | 1, ~dtype.uint.type(0), 1], dtype.uint)
        at = rng.random(n) < 0.1
        bits[at] = rng.choice(chosen, n)[at]
    bits[rng.random(n) >= density] = 0
    return bits
