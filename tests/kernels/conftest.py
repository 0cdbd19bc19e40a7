"""Which kernels the tests run, and elements that exercise every branch of the codecs."""

import os

import numpy as np
import pytest

from endor.codecs import DType
from endor.kernels import native

STYLES = ("noise", "window", "outliers", "specials")


def need(name: str) -> None:
    """Skip, with a reason, unless kernel `name` runs here; fail where it is required to."""
    if name == "numpy" or name in native.available():
        return
    if not native.available():
        _, why = native.load()
        if os.environ.get("ENDOR_REQUIRE_NATIVE") == "1":
            pytest.fail(f"ENDOR_REQUIRE_NATIVE=1, but {why}")
        pytest.skip(why)
    pytest.skip(f"this CPU does not run {name}")


@pytest.fixture(params=["avx512", "avx2", "neon", "scalar", "numpy"])
def kernel(request: pytest.FixtureRequest) -> str:
    """Each kernel, the reference included."""
    name: str = request.param
    need(name)
    return name


@pytest.fixture(params=["avx512", "avx2", "neon", "scalar"])
def compiled(request: pytest.FixtureRequest) -> str:
    """Each compiled kernel."""
    name: str = request.param
    need(name)
    return name


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
