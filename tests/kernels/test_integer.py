"""Codec `int`: every kernel gives the reference's bytes and elements; hostile arrays harm none."""

import contextlib

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from endor import codecs, kernels
from endor.codecs import DTYPES, Encoded, integer, planning, rans
from endor.codecs.planning import CodePlan
from endor.codecs.rounding import floats_of
from endor.errors import FormatError

from ..conftest import KERNELS, need
from .test_contract import assert_decodes, assert_same

SIZES = [(0, 3), (1, 1), (31, 1), (1, 32), (3, 11), (1, 1024), (1, 32768), (1, 32769), (130, 577)]
LAYOUTS = ("columns", "rows", "one", "groups", "blocks", "experts")


def tensor(
    rng: np.random.Generator,
    shape: tuple[int, int],
    spread: float,
    layout: str,
    name: str,
    outliers: bool = True,
) -> tuple[np.ndarray, np.ndarray, tuple[int, int]]:
    """Return codes, steps and the block that shares one."""
    codes = np.rint(rng.standard_normal(shape) * spread).astype(np.int32)
    if outliers and codes.size:
        at = codes.reshape(-1)[:: 1 + codes.size // 9]
        at[:] = rng.integers(-(2**24), 2**24 + 1, at.size)
    rows, cols = (max(size, 1) for size in shape)
    block = {
        "columns": (rows, 1),
        "rows": (1, cols),
        "one": (rows, cols),
        "groups": (1, min(cols, 32)),
        "blocks": (min(rows, 7), min(cols, 100)),
        "experts": (-(-rows // 2), 1),
    }[layout]
    count = tuple(-(-size // side) for size, side in zip(shape, block, strict=True))
    steps = (rng.random(count) + 0.01) * 2.0 ** rng.integers(-60, 60)
    return codes, integer.round_steps(steps) if rng.random() < 0.7 else steps, block


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("name", ["BF16", "F16", "F32"])
@pytest.mark.parametrize("count", [2, 16, 256])
def test_levels(kernel: str, name: str, count: int) -> None:
    need(kernel)
    rng = np.random.default_rng(count)
    levels = rng.permutation(np.linspace(-3, 3, count)).astype(np.float32)
    levels[0] = -0.0
    for shape in ((1, 1), (3, 11), (130, 577), (2, 32769)):
        codes = np.minimum(rng.geometric(0.1, shape) - 1, count - 1)
        steps = integer.round_steps(rng.random((1, shape[1])) + 0.01)
        wanted = integer.encode(codes, steps, DTYPES[name], levels=levels)
        found = kernels.integer.encode(
            codes, steps, DTYPES[name], levels=levels, kernel=kernel, threads=2
        )
        assert_same(found, wanted)
        assert np.array_equal(kernels.integer.codes_of(found, kernel=kernel), codes)
        bits = codecs.decode(wanted).reshape(-1)
        for start, stop in ((0, bits.size), (bits.size // 3, bits.size - bits.size // 5)):
            out = np.empty(stop - start, bits.dtype)
            kernels.decode(found, out, start=start, stop=stop, kernel=kernel, threads=2)
            assert np.array_equal(out, bits[start:stop])


@pytest.mark.parametrize("kernel", KERNELS)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    seed=st.integers(0, 2**32 - 1),
    shape=st.sampled_from(SIZES),
    spread=st.sampled_from([0.0, 0.3, 2.0, 20.0, 300.0, 9000.0]),
    layout=st.sampled_from(LAYOUTS),
    name=st.sampled_from(["BF16", "F16", "F32"]),
    outliers=st.booleans(),
    threads=st.integers(1, 3),
    pad=st.integers(0, 70),
    streaming=st.booleans(),
    cut=st.tuples(st.floats(0, 1), st.floats(0, 1)),
)
def test_every_kernel_agrees(
    kernel: str,
    seed: int,
    shape: tuple[int, int],
    spread: float,
    layout: str,
    name: str,
    outliers: bool,
    threads: int,
    pad: int,
    streaming: bool,
    cut: tuple[float, float],
) -> None:
    need(kernel)
    rng = np.random.default_rng(seed)
    codes, steps, block = tensor(rng, shape, spread, layout, name, outliers)
    item = DTYPES[name]
    with np.errstate(over="ignore"):
        wanted = integer.encode(codes, steps, item, block=block)
        dense = integer.dense_of(codes, steps, item, block=block).reshape(-1)
    found = kernels.integer.encode(codes, steps, item, block=block, threads=threads, kernel=kernel)
    assert_same(found, wanted)
    codecs.validate(found)
    assert np.array_equal(kernels.integer.codes_of(found, threads=threads, kernel=kernel), codes)
    start, stop = sorted(round(share * codes.size) for share in cut)
    for low, high in ((0, codes.size), (start, stop)):
        assert_decodes(wanted, dense, kernel, low, high, pad, threads=threads, streaming=streaming)


@pytest.mark.parametrize("heavy", [0, 7, 4000])
def test_symbols_of_any_frequency_are_coded(
    compiled: str, heavy: int, rng: np.random.Generator
) -> None:
    """Symbols drawn evenly, whatever their frequencies: states reach every height."""
    number = kernels.select(compiled)
    assert number is not None
    for kinds in (2, 3, 40, 96):
        frequencies = np.ones(kinds, dtype=np.int64)
        frequencies += rng.multinomial(4096 - kinds - min(heavy, 4096 - kinds), [1 / kinds] * kinds)
        frequencies[-1] += 4096 - frequencies.sum()
        plan = CodePlan(0, 0, frequencies, 0.0)
        for size in (1, 31, 32768, 70001):
            symbols = rng.integers(0, kinds, size, dtype=np.uint8)
            found = kernels.integer.code(symbols, plan, 2, number)
            for mine, wanted in zip(found, rans.code(symbols, plan), strict=True):
                assert np.array_equal(mine, wanted)


@pytest.mark.parametrize("shift", [0, 1, 3, 8])
def test_codes_are_split_as_the_reference_splits_them(
    compiled: str, shift: int, rng: np.random.Generator
) -> None:
    frequencies = np.array([5, 0, 4000, 91], dtype=np.int64)
    plan = CodePlan(-2, shift, frequencies, 0.0)
    for size in (0, 1, 7, 32, 33, 40000):
        codes = rng.integers(-4 << shift, 4 << shift, size, dtype=np.int32)
        codes[:: 1 + size // 3] = rng.choice([-(2**24), 2**24], codes[:: 1 + size // 3].size)
        symbols, low_bits, patched = kernels.integer.split(codes, plan, 2)
        wanted, unknown = plan.symbols_of(codes)
        assert np.array_equal(symbols, wanted)
        assert np.array_equal(patched, np.flatnonzero(unknown))
        assert np.array_equal(low_bits, integer.low_bits_of(codes, shift, patched))


@pytest.mark.parametrize(("low", "size"), [(-3, 6), (0, 1), (-100, 4096), (-2100, 4200)])
def test_codes_are_counted_as_the_reference_counts_them(
    compiled: str, low: int, size: int, rng: np.random.Generator
) -> None:
    for count in (0, 1, 5, 30000):
        codes = rng.integers(-2500, 2500, count, dtype=np.int32)
        codes[:2] = (-(2**24), 2**24)[:count]
        found = kernels.integer.count_codes(codes, low, size)
        assert np.array_equal(found, planning.count_codes(codes, low, size))


def test_beyond_the_streaming_size(compiled: str, rng: np.random.Generator) -> None:
    codes, steps, block = tensor(rng, (3000, 3001), 2, "columns", "BF16")
    encoded = kernels.integer.encode(codes, steps, DTYPES["BF16"], block=block, kernel=compiled)
    dense = integer.dense_of(codes, steps, DTYPES["BF16"], block=block).reshape(-1)
    for pad in (0, 24, 1):
        assert_decodes(encoded, dense, compiled, 0, dense.size, pad)


@pytest.mark.parametrize("suffix", ["words", "states", "chunk_offsets", "frequencies"])
def test_contradictions_are_noticed(compiled: str, suffix: str, rng: np.random.Generator) -> None:
    codes, steps, block = tensor(rng, (300, 300), 3, "columns", "BF16")
    encoded = integer.encode(codes, steps, DTYPES["BF16"], block=block)
    array = encoded.arrays[suffix].copy()
    flat = array.reshape(-1)
    if suffix == "frequencies":
        flat[flat.argmax()] -= 1
        flat[flat.argsort()[-2]] += 1
    else:
        flat[flat.size // 2] ^= 1 << 11
    broken = Encoded(encoded.spec, {**encoded.arrays, suffix: array})
    out = np.empty(codes.size, np.uint16)
    with pytest.raises(FormatError):
        kernels.decode(broken, out, kernel=compiled)
    with pytest.raises(FormatError):
        kernels.integer.codes_of(broken, kernel=compiled)
    x, y = np.ones((1, 300), np.float32), np.empty((1, 300), np.float32)
    with pytest.raises(FormatError):
        kernels.matvec(broken, x, y, kernel=compiled)


@pytest.mark.parametrize("kernel", KERNELS[:-1])
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    seed=st.integers(0, 2**32 - 1),
    shape=st.sampled_from([(1, 33), (2, 20000), (90, 400)]),
    spread=st.sampled_from([0.0, 2.0, 700.0]),
    suffix=st.sampled_from(["words", "states", "chunk_offsets", "frequencies", "patch_offsets"]),
)
def test_noise_harms_nothing(
    kernel: str, seed: int, shape: tuple[int, int], spread: float, suffix: str
) -> None:
    """Arrays that were never validated: nothing around `out` is written, nothing crashes."""
    need(kernel)
    rng = np.random.default_rng(seed)
    codes, steps, block = tensor(rng, shape, spread, "columns", "BF16")
    encoded = integer.encode(codes, steps, DTYPES["BF16"], block=block)
    noise = {}
    for key, array in encoded.arrays.items():
        copy = array.copy()
        if key == suffix or rng.random() < 0.1:
            flat = copy.reshape(-1).view(np.uint8)
            flat[:] = rng.integers(0, 256, flat.size)
        noise[key] = copy
    if suffix != "frequencies":
        noise["frequencies"] = encoded.arrays["frequencies"]
    buffer = np.full(codes.size + 64, 0xA5A5, np.uint16)
    with contextlib.suppress(FormatError):
        kernels.decode(Encoded(encoded.spec, noise), buffer[32:-32], kernel=kernel, threads=2)
    assert (buffer[:32] == 0xA5A5).all()
    assert (buffer[-32:] == 0xA5A5).all()


@pytest.mark.parametrize("name", ["BF16", "F16", "F32"])
@pytest.mark.parametrize("batch", [1, 2, 3, 8, 9])
def test_products(kernel: str, name: str, batch: int, rng: np.random.Generator) -> None:
    item = DTYPES[name]
    for shape in ((1, 5), (257, 131), (40, 4096)):
        codes = np.rint(rng.standard_normal(shape) * 3).astype(np.int32)
        codes[0, 0] = 2000
        steps = integer.round_steps(rng.random(shape[1]) / 64 + 0.001)
        encoded = kernels.integer.encode(codes, steps, item)
        weight = floats_of(codecs.decode(encoded), item).astype(np.float64)
        x = rng.standard_normal((batch, shape[1])).astype(np.float32)
        bound = 2.0**-24 * (shape[1] / 16 + 16) * (np.abs(x) @ np.abs(weight).T)
        for threads in (1, 2):
            out = np.full((batch, shape[0]), np.nan, np.float32)
            kernels.matvec(encoded, x, out, threads=threads, kernel=kernel)
            assert (np.abs(out - x.astype(np.float64) @ weight.T) <= bound).all()


@pytest.mark.parametrize("name", ["BF16", "F16", "F32"])
@pytest.mark.parametrize("batch", [1, 3, 8, 9])
def test_prepared_products(compiled: str, name: str, batch: int, rng: np.random.Generator) -> None:
    item = DTYPES[name]
    codes = np.rint(rng.standard_normal((257, 576)) * 3).astype(np.int32)
    codes[1, 1] = 2**20
    encoded = kernels.integer.encode(codes, integer.round_steps(rng.random(576) + 0.01), item)
    bits = rng.standard_normal((batch, 576)).astype(np.float32)
    x = integer.to_dtype(bits, item)
    wanted, found = np.empty((2, batch, 257), np.float32)
    kernels.matvec(encoded, x, wanted, threads=2, kernel=compiled)
    kernel = kernels.Prepared(encoded.spec, threads=2, kernel=compiled)
    assert kernel.multiplies
    kernel.matvec(encoded, x.ctypes.data, batch, found.ctypes.data)
    assert np.array_equal(found.view(np.uint32), wanted.view(np.uint32))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("name", ["BF16", "F16", "F32"])
def test_products_with_levels(kernel: str, name: str) -> None:
    need(kernel)
    rng = np.random.default_rng(7)
    levels = rng.standard_normal(16).astype(np.float32)
    codes = rng.integers(0, 16, (70, 515))
    steps = integer.round_steps(rng.random((70, 5)) + 0.1)
    encoded = integer.encode(codes, steps, DTYPES[name], levels=levels, block=(1, 103))
    weight = floats_of(codecs.decode(encoded), DTYPES[name])
    inputs = DTYPES[name].uint.type(0) + rng.integers(0, 1 << 10, (3, 515)).astype(
        DTYPES[name].uint
    )
    x = floats_of(inputs, DTYPES[name])
    out = np.empty((3, 70), np.float32)
    kernels.matvec(encoded, inputs, out, kernel=kernel, threads=2)
    np.testing.assert_allclose(out, x.astype(np.float64) @ weight.T, rtol=1e-5, atol=1e-30)
