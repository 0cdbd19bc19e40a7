"""Products straight from packed weights, against float64."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from endor import codecs, kernels
from endor.codecs import DTYPES, DType
from endor.errors import DTypeError, FormatError, ShapeError
from endor.kernels import native

from ..conftest import KERNELS, need

KINDS = ["BF16", "F16", "F32"]


def floats(bits: np.ndarray, item: DType) -> np.ndarray:
    if bits.dtype == np.float32 or item.name == "F32":
        return bits.view(np.float32).astype(np.float64)
    if item.name == "F16":
        return bits.view(np.float16).astype(np.float64)
    return (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


def rounded(values: np.ndarray, item: DType) -> np.ndarray:
    single = values.astype(np.float32)
    if item.name == "F32":
        return single.view(np.uint32)
    if item.name == "F16":
        return single.astype(np.float16).view(np.uint16)
    return (single.view(np.uint32) >> 16).astype(np.uint16)


def weights(
    rng: np.random.Generator, item: DType, rows: int, cols: int, density: float
) -> np.ndarray:
    values = rng.standard_normal((rows, cols))
    values[rng.random((rows, cols)) >= density] = 0
    return rounded(values, item)


def assert_product(
    encoded: codecs.Encoded, weight: np.ndarray, x: np.ndarray, **how: object
) -> np.ndarray:
    item = encoded.spec.dtype
    rows, cols = weight.shape
    out = np.full((x.shape[0], rows), np.nan, dtype=np.float32)
    assert kernels.matvec(encoded, x, out, **how) is out  # type: ignore[arg-type]
    exact = floats(x, item) @ floats(weight, item).T
    scale = np.abs(floats(x, item)) @ np.abs(floats(weight, item)).T
    bound = scale * 2.0**-24 * (cols / 16 + 16)
    wrong = np.argwhere(~(np.abs(out - exact) <= bound))
    assert not wrong.size, f"{encoded.spec} at {wrong[0]}"
    return out


@pytest.mark.parametrize("kernel", KERNELS)
@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    name=st.sampled_from(KINDS),
    rows=st.integers(0, 40),
    cols=st.one_of(st.integers(0, 20).map(lambda k: 64 * k), st.integers(0, 1500)),
    density=st.sampled_from([0.0, 0.02, 0.3, 0.5, 1.0]),
    how=st.sampled_from([("raw", None), ("exp", True), ("exp", False), ("dense", None)]),
    batch=st.integers(0, 18),
    single=st.booleans(),
    threads=st.integers(1, 4),
)
def test_against_float64(
    kernel: str,
    seed: int,
    name: str,
    rows: int,
    cols: int,
    density: float,
    how: tuple[codecs.CodecChoice, bool | None],
    batch: int,
    single: bool,
    threads: int,
) -> None:
    need(kernel)
    rng = np.random.default_rng(seed)
    item = DTYPES[name]
    weight = weights(rng, item, rows, cols, density)
    encoded = codecs.encode(weight, item, codec=how[0], bitmap=how[1])
    x = rng.standard_normal((batch, cols)).astype(np.float32)
    assert_product(
        encoded, weight, x if single else rounded(x, item), threads=threads, kernel=kernel
    )


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize(
    ("codec", "bitmap"), [("raw", True), ("exp", True), ("exp", False), ("dense", None)]
)
@pytest.mark.parametrize("batch", range(1, 10))
def test_threads_do_not_change_the_sum(
    compiled: str, name: str, codec: codecs.CodecChoice, bitmap: bool | None, batch: int
) -> None:
    rng = np.random.default_rng(batch)
    item = DTYPES[name]
    weight = weights(rng, item, 301, 192, 0.5)
    encoded = codecs.encode(weight, item, codec=codec, bitmap=bitmap)
    for x in (rng.standard_normal((batch, 192)).astype(np.float32),):
        for given_x in (x, rounded(x, item)):
            outs = [
                assert_product(encoded, weight, given_x, threads=threads, kernel=compiled)
                for threads in (1, 2, 4)
            ]
            assert all(np.array_equal(outs[0], out) for out in outs)


@pytest.mark.parametrize("codec", ["raw", "exp"])
def test_threads_share_the_rows(compiled: str, codec: str, rng: np.random.Generator) -> None:
    """Enough work that sleeping threads are woken for it."""
    item = DTYPES["BF16"]
    weight = weights(rng, item, 1101, 1024, 0.5)
    encoded = codecs.encode(weight, item, codec=codec)  # type: ignore[arg-type]
    x = rounded(rng.standard_normal((3, 1024)).astype(np.float32), item)
    outs = [
        assert_product(encoded, weight, x, threads=threads, kernel=compiled)
        for threads in (1, 2, 4, 4, 4)
    ]
    assert all(np.array_equal(outs[0], out) for out in outs)


@pytest.mark.parametrize("density", [0.1, 0.5, 0.75, 0.95])
@pytest.mark.parametrize("outliers", [0, 0.0005, 0.02])
@pytest.mark.parametrize(("code_bits", "base"), [(1, 120), (2, 120), (2, 121), (3, 119), (8, 0)])
def test_every_exp_stream(
    compiled: str, code_bits: int, base: int, outliers: float, density: float
) -> None:
    """Odd and even bases, patches few and many, and words of which every weight is stored."""
    rng = np.random.default_rng(code_bits + base)
    item = DTYPES["BF16"]
    rows, cols = 53, 64 * 19
    low, high = max(base, 100), min(base + (1 << code_bits), 140)
    exponents = rng.integers(low, high, rows * cols)
    at = rng.random(rows * cols) < outliers
    exponents[at] = rng.integers(90, 150, rows * cols)[at]
    weight = item.join(exponents, rng.integers(0, 256, rows * cols, dtype=np.uint64))
    weight[rng.random(rows * cols) >= density] = 0
    full = item.join(exponents[: 64 * 40], rng.integers(0, 256, 64 * 40, dtype=np.uint64))
    weight[64 * 100 : 64 * 140] = full
    encoded = codecs.exp.encode(weight, item, bitmap=True, k=code_bits, base=base)
    spec = dataclasses.replace(encoded.spec, shape=(rows, cols))
    encoded, weight = codecs.Encoded(spec, encoded.arrays), weight.reshape(rows, cols)
    for batch in (1, 2, 3, 5, 9):
        x = rng.standard_normal((batch, cols)).astype(np.float32)
        for given_x in (x, rounded(x, item)):
            outs = [
                assert_product(encoded, weight, given_x, threads=threads, kernel=compiled)
                for threads in (1, 3)
            ]
            assert np.array_equal(outs[0], outs[1])


@pytest.mark.parametrize("cols", [64, 192, 1024, 2048, 2112, 4224])
@pytest.mark.parametrize("density", [0.02, 0.3, 0.5, 0.9])
@pytest.mark.parametrize(("code_bits", "base"), [(1, 126), (2, 124), (3, 121), (4, 112)])
def test_avx2_decodes_ahead_what_raw_stores(
    code_bits: int, base: int, density: float, cols: int
) -> None:
    """Several rows in a span and several spans in a row: the sums of `raw` to the bit."""
    if "avx2" not in native.available():
        pytest.skip("this CPU does not run avx2")
    rng = np.random.default_rng(cols + code_bits)
    rows = 8192 // cols + 37
    weight = weights(rng, DTYPES["BF16"], rows, cols, density)
    weight[rows // 2 :] = weights(rng, DTYPES["BF16"], rows - rows // 2, cols, density / 2)
    x = rng.standard_normal((1, cols)).astype(np.float32)
    coded = codecs.exp.encode(weight.ravel(), DTYPES["BF16"], bitmap=True, k=code_bits, base=base)
    exp = codecs.Encoded(dataclasses.replace(coded.spec, shape=(rows, cols)), coded.arrays)
    raw = codecs.encode(weight, DTYPES["BF16"], codec="raw", bitmap=True)
    expected = assert_product(raw, weight, x, kernel="avx2")
    for threads in (1, 3):
        found = assert_product(exp, weight, x, threads=threads, kernel="avx2")
        assert np.array_equal(found.view(np.uint32), expected.view(np.uint32))


def test_infinities_stay_in_their_row(compiled: str) -> None:
    """Padding, masked tails and neighbouring rows must not turn 0 * inf into NaN."""
    for cols in (64, 100):
        weight = np.full((6, cols), 0x3F80, dtype=np.uint16)
        weight[2, 5] = 0x7F80
        encoded = codecs.encode(weight, DTYPES["BF16"], codec="raw")
        out = np.empty((1, 6), dtype=np.float32)
        kernels.matvec(encoded, np.ones((1, cols), dtype=np.float32), out, kernel=compiled)
        assert out[0].tolist() == [cols, cols, np.inf, cols, cols, cols]


def test_contradictions_are_noticed(compiled: str, rng: np.random.Generator) -> None:
    weight = weights(rng, DTYPES["BF16"], 50, 100, 0.5)
    encoded = codecs.encode(weight, DTYPES["BF16"], codec="exp")
    bitmap = encoded.arrays["bitmap"].copy()
    bitmap[200] ^= 1
    broken = codecs.Encoded(encoded.spec, {**encoded.arrays, "bitmap": bitmap})
    x, out = np.ones((1, 100), dtype=np.float32), np.empty((1, 50), dtype=np.float32)
    with pytest.raises(FormatError):
        kernels.matvec(broken, x, out, kernel=compiled)


def test_wrong_arguments(kernel: str) -> None:
    weight = np.ones((4, 8), dtype=np.uint16)
    encoded = codecs.encode(weight, DTYPES["BF16"], codec="raw")
    x, out = np.ones((2, 8), dtype=np.float32), np.empty((2, 4), dtype=np.float32)
    for bad_x, bad_out, error in (
        (x.astype(np.float64), out, DTypeError),
        (x, out.astype(np.float64), DTypeError),
        (x[:, :7], out, ShapeError),
        (x[0], out, ShapeError),
        (x, out[:1], ShapeError),
        (np.asfortranarray(x), out, ShapeError),
        (x, np.asfortranarray(out), ShapeError),
    ):
        with pytest.raises(error):
            kernels.matvec(encoded, bad_x, bad_out, kernel=kernel)
    whole = codecs.encode(np.ones((4, 8), dtype=np.uint8), DTYPES["I8"], codec="raw")
    with pytest.raises(DTypeError):
        kernels.matvec(whole, x, out, kernel=kernel)
    flat = codecs.encode(weight.reshape(-1), DTYPES["BF16"], codec="raw")
    with pytest.raises(ShapeError):
        kernels.matvec(flat, x, out, kernel=kernel)
