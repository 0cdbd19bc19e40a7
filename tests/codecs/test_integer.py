"""Codec `int` in numpy: values, sizes, steps, and one bad input per error."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from endor import codecs
from endor.codecs import DTYPES, Encoded, TensorSpec, integer
from endor.errors import ConfigError, DTypeError, EndorError, FormatError, ShapeError

VALUES = ("BF16", "F16", "F32")
BF16 = DTYPES["BF16"]


def normal(rng: np.random.Generator, shape: tuple[int, ...], spread: float) -> np.ndarray:
    return np.rint(rng.standard_normal(shape) * spread).astype(np.int32)


def change(encoded: Encoded, suffix: str, at: int, value: int) -> Encoded:
    array = encoded.arrays[suffix].copy()
    array.reshape(-1)[at] = value
    return Encoded(encoded.spec, {**encoded.arrays, suffix: array})


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    shape=st.sampled_from([(), (0, 4), (4, 0), (1,), (3, 11), (1, 32), (33, 1024), (2, 3, 6000)]),
    spread=st.sampled_from([0.0, 0.2, 1.0, 6.0, 90.0, 2000.0, 1e6]),
    outliers=st.booleans(),
    name=st.sampled_from(VALUES),
)
def test_round_trip(
    seed: int, shape: tuple[int, ...], spread: float, outliers: bool, name: str
) -> None:
    rng = np.random.default_rng(seed)
    codes = np.asarray(normal(rng, shape, spread))
    if outliers and codes.size:
        codes.reshape(-1)[::71] = rng.integers(-(2**24), 2**24 + 1, codes.reshape(-1)[::71].size)
    steps = integer.round_steps(rng.random(shape[-1] if shape else 1) - 0.5)
    encoded = integer.encode(codes, steps, DTYPES[name])
    codecs.validate(encoded)
    assert TensorSpec.from_dict(encoded.spec.to_dict()) == encoded.spec
    assert np.array_equal(integer.codes_of(encoded), codes)
    if codes.size:
        assert np.array_equal(integer.steps_of(encoded).reshape(-1), steps)
    assert np.array_equal(codecs.decode(encoded), integer.dense_of(codes, steps, DTYPES[name]))


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    shape=st.sampled_from([(), (0, 4), (1,), (3, 11), (33, 1024), (2, 3, 6000)]),
    count=st.sampled_from([2, 3, 16, 255, 256]),
    name=st.sampled_from(VALUES),
)
def test_levels(seed: int, shape: tuple[int, ...], count: int, name: str) -> None:
    rng = np.random.default_rng(seed)
    levels = rng.standard_normal(count).astype(np.float32)
    levels[0] = -0.0
    codes = np.asarray(np.minimum(rng.geometric(0.3, shape) - 1, count - 1), dtype=np.uint8)
    steps = integer.round_steps(rng.random(shape[-1] if shape else 1) + 0.1)
    encoded = integer.encode(codes, steps, DTYPES[name], levels=levels)
    codecs.validate(encoded)
    assert TensorSpec.from_dict(encoded.spec.to_dict()) == encoded.spec
    assert np.array_equal(integer.codes_of(encoded), codes)
    assert np.array_equal(integer.levels_of(encoded).view("u4"), levels.view("u4"))
    values = levels[codes] * steps.reshape(-1)[: max(1, codes.size)] if codes.size else levels[:0]
    found = codecs.decode(encoded)
    if name == "F32":
        assert np.array_equal(found.reshape(-1), np.asarray(values).reshape(-1).view(np.uint32))
    elif name == "F16":
        half = np.asarray(values).astype(np.float16)
        assert np.array_equal(found.reshape(-1), half.reshape(-1).view(np.uint16))


LEVELS = np.array([0.0, 1.0, -2.0, 3.0], np.float32)


@pytest.mark.parametrize(
    ("levels", "codes", "steps"),
    [
        (LEVELS[:1], [[0, 0]], 1.0),
        (LEVELS.astype(np.float64), [[0, 1]], 1.0),
        (LEVELS.reshape(2, 2), [[0, 1]], 1.0),
        (np.zeros(257, np.float32), [[0, 1]], 1.0),
        (np.array([0, np.inf], np.float32), [[0, 1]], 1.0),
        (np.array([0, np.nan], np.float32), [[0, 1]], 1.0),
        (np.array([0, 2.0**-127], np.float32), [[0, 1]], 1.0),
        (np.array([0, 2.0**-100], np.float32), [[0, 1]], 2.0**-30),
        (LEVELS, [[0, 4]], 1.0),
        (LEVELS, [[-1, 0]], 1.0),
    ],
)
def test_levels_that_are_refused(levels: np.ndarray, codes: list[list[int]], steps: float) -> None:
    with pytest.raises(ConfigError, match="level"):
        integer.encode(np.array(codes), steps, BF16, levels=levels)


def test_damaged_levels() -> None:
    encoded = integer.encode(np.array([[0, 1, 2, 3]]), 1.0, BF16, levels=LEVELS)
    for value in (np.inf, np.nan, 2.0**-140):
        bits = int(np.float32(value).view(np.uint32))
        with pytest.raises(FormatError, match="levels"):
            codecs.validate(change(encoded, "levels", 1, bits))
    header = encoded.spec.to_dict()
    for key, wrong in (("levels", 1), ("levels", False), ("base", 1), ("shift", 1), ("patches", 1)):
        with pytest.raises(FormatError):
            TensorSpec.from_dict(header | {key: wrong})


def test_values_are_products_in_float32_rounded_to_even() -> None:
    codes = np.array([[1, 3, -7, 255, 0, 65519, 65520, 1 << 24]])
    step = np.float32(1.0 + 2.0**-8)
    exact = codes.astype(np.float32) * step
    f32 = integer.encode(codes, step, DTYPES["F32"])
    assert np.array_equal(codecs.decode(f32).view(np.float32), exact)
    f16 = codecs.decode(integer.encode(codes, 1.0, DTYPES["F16"])).view(np.float16)
    assert f16[0, 5] == 65504
    assert np.isinf(f16[0, 6:]).all()
    bf16 = codecs.decode(integer.encode(codes, step, BF16))
    assert bf16[0, :2].tolist() == [0x3F80, 0x4041]  # 1 + 2^-8 is a tie, 3 + 3 * 2^-8 is not
    assert codecs.decode(integer.encode(codes, -1.0, BF16))[0, 4] == 0x8000


@pytest.mark.parametrize(
    ("shape", "steps", "block", "found"),
    [
        ((6, 8), (8,), None, (6, 1)),
        ((6, 8), (1, 8), None, (6, 1)),
        ((6, 8), (6, 1), None, (1, 8)),
        ((6, 8), (6, 2), None, (1, 4)),
        ((6, 8), (3, 2), None, (2, 4)),
        ((6, 8), (), None, (6, 8)),
        ((6, 9), (2, 3), (4, 4), (4, 4)),
        ((2, 3, 8), (2, 8), None, (3, 1)),
        ((2, 3, 8), (2, 1, 8), None, (3, 1)),
        ((8,), (8,), None, (1, 1)),
    ],
)
def test_layouts_of_steps(
    shape: tuple[int, ...],
    steps: tuple[int, ...],
    block: tuple[int, int] | None,
    found: tuple[int, int],
    rng: np.random.Generator,
) -> None:
    codes = normal(rng, shape, 3)
    values = integer.round_steps(rng.random(steps) + 0.1)
    encoded = integer.encode(codes, values, DTYPES["F32"], block=block)
    assert encoded.spec.coding is not None
    assert encoded.spec.coding.step_block == found
    rows, cols = codes.reshape(-1, shape[-1]).shape
    table = integer.steps_of(encoded)
    wanted = table[np.arange(rows)[:, None] // found[0], np.arange(cols) // found[1]]
    product = codes.reshape(rows, cols).astype(np.float32) * wanted
    assert np.array_equal(codecs.decode(encoded).view(np.float32), product.reshape(shape))


def test_rounded_steps_take_16_bits_and_stay_themselves(rng: np.random.Generator) -> None:
    wild = np.exp(rng.uniform(-12, 12, 999)) * rng.choice([-1, 1], 999)
    for scale in (1e-30, 1e-6, 1.0, 1e30):
        steps = integer.round_steps(wild * scale)
        assert np.array_equal(integer.round_steps(steps), steps)
        near = np.abs(wild) > np.abs(wild).max() / 2**28
        assert np.allclose(steps[near] / (wild * scale)[near], 1, rtol=2**-11)
        assert (steps != 0).all()
        encoded = integer.encode(np.ones((1, 999), np.int32), steps, DTYPES["F32"])
        assert encoded.spec.coding is not None
        assert encoded.spec.coding.step_dtype == "F16"
        assert np.array_equal(integer.steps_of(encoded)[0], steps)
    assert not integer.round_steps(np.zeros(3)).any()


def test_steps_of_other_formats_are_kept_exactly(rng: np.random.Generator) -> None:
    ones = np.ones((1, 50), np.int32)
    half = rng.random(50).astype(np.float16)
    single = rng.random(50).astype(np.float32)
    brain = (single.view(np.uint32) & 0xFFFF0000).view(np.float32) * np.float32(2.0) ** np.arange(
        -25, 25
    )
    for steps, name in ((half, "F16"), (brain, "BF16"), (single, "F32")):
        encoded = integer.encode(ones, steps, DTYPES["F32"])
        assert encoded.spec.coding is not None
        assert encoded.spec.coding.step_dtype == name
        assert np.array_equal(integer.steps_of(encoded)[0], steps.astype(np.float32))


@pytest.mark.parametrize("bits", [1.0, 2.0, 3.0, 4.0, 6.0, 8.0])
def test_size_is_near_the_entropy_and_predicted(bits: float, rng: np.random.Generator) -> None:
    codes = np.rint(rng.laplace(size=(1024, 1024)) * 2.0**bits / 5.5).astype(np.int32)
    encoded = integer.encode(codes, integer.round_steps(rng.random(1024) + 0.1), BF16)
    entropy, size = integer.entropy_bits(codes), encoded.spec.bits_per_weight
    assert entropy < size < entropy + 0.08
    assert abs(integer.size_bits(codes) - size) < 0.002
    assert abs(integer.size_bits(codes, integer.steps_of(encoded)) - size) < 0.002


def test_entropy_of_little() -> None:
    assert integer.entropy_bits(np.zeros(0, np.int32)) == 0
    assert integer.size_bits(np.zeros((0, 5), np.int32)) == 0
    assert integer.entropy_bits(np.array([0, 1, 2, 3])) == 2
    assert integer.entropy_bits(np.array([-(2**24), 2**24])) == 1


@pytest.mark.parametrize(
    ("codes", "steps", "dtype", "error", "match"),
    [
        (np.ones((2, 2)), 1.0, BF16, DTypeError, "must be integers"),
        (np.ones((2, 2), int), 1.0, DTYPES["I8"], DTypeError, "codec int takes"),
        (np.full((2, 2), 2**24 + 1), 1.0, BF16, ConfigError, "codes must lie"),
        (np.full((2, 2), -(2**40)), 1.0, BF16, ConfigError, "codes must lie"),
        (np.ones((2, 2), int), np.nan, BF16, ConfigError, "finite"),
        (np.ones((2, 2), int), 1e300, BF16, ConfigError, "finite"),
        (np.ones((2, 2), int), 1e-40, BF16, ConfigError, "round_steps"),
        (np.ones((2, 2), int), np.ones(3), BF16, ShapeError, "divide"),
        (np.ones((2, 2), int), np.ones((0, 2)), BF16, ShapeError, "divide"),
    ],
)
def test_what_cannot_be_stored(
    codes: np.ndarray,
    steps: np.ndarray | float,
    dtype: codecs.DType,
    error: type[EndorError],
    match: str,
) -> None:
    with pytest.raises(error, match=match):
        integer.encode(codes, steps, dtype)


def test_shape_that_does_not_fit() -> None:
    with pytest.raises(ShapeError, match="does not hold"):
        integer.encode(np.ones(5, int), 1.0, BF16, shape=(2, 3))
    with pytest.raises(ShapeError, match="must have shape"):
        integer.encode(np.ones((4, 4), int), np.ones((2, 2)), BF16, block=(1, 4))


@pytest.fixture
def damaged(rng: np.random.Generator) -> Encoded:
    """Two chunks, with low bits and patches."""
    codes = normal(rng, (40, 1000), 900)
    codes.reshape(-1)[::1000] = 100_000
    encoded = integer.encode(codes, integer.round_steps(rng.random(1000) + 0.1), BF16)
    assert encoded.spec.patches > 1
    assert encoded.spec.coding is not None
    assert encoded.spec.coding.shift > 1
    codecs.validate(encoded)
    return encoded


@pytest.mark.parametrize(
    ("suffix", "at", "value", "match"),
    [
        ("frequencies", 3, 4095, "frequencies must sum"),
        ("frequencies", 0, 60_000, "frequencies must sum"),
        ("chunk_offsets", 0, 1, "chunk_offsets must rise"),
        ("chunk_offsets", 1, 2**32 - 1, "chunk_offsets must rise"),
        ("chunk_offsets", 2, 7, "chunk_offsets must rise"),
        ("states", 5, 65535, "states must be at least"),
        ("low_bits", -1, 255, None),
        ("steps", 5, 0x7C00, "steps must be 0"),
        ("steps", 5, 0xFE00, "steps must be 0"),
        ("patch_offsets", 0, 1, "patch_offsets must rise"),
        ("patch_offsets", 2, 3, "patch_offsets must rise"),
        ("patch_ranks", 0, 32768, "inside its chunk"),
        ("patch_ranks", 0, 32767, "strictly increasing"),
        ("patch_ranks", -1, 20_000, "strictly increasing, inside"),
        ("patch_codes", 0, 2**24 + 1, "patch_codes must lie"),
        ("patch_codes", 0, 2**31, "patch_codes must lie"),
    ],
)
def test_damage_is_named(
    damaged: Encoded, suffix: str, at: int, value: int, match: str | None
) -> None:
    broken = change(damaged, suffix, at, value)
    if match is None:  # 40,000 elements fill their last row
        codecs.validate(broken)
        return
    with pytest.raises(FormatError, match=match):
        codecs.validate(broken)


def test_low_bits_past_the_end_must_be_zero(rng: np.random.Generator) -> None:
    encoded = integer.encode(normal(rng, (3, 1001), 900), 1.0, BF16)
    with pytest.raises(FormatError, match="low_bits past element 3003"):
        codecs.validate(change(encoded, "low_bits", -1, 128))


@pytest.mark.parametrize("suffix", ["words", "states", "frequencies"])
def test_streams_that_do_not_end_well(damaged: Encoded, suffix: str) -> None:
    array = damaged.arrays[suffix].copy()
    if suffix == "frequencies":
        array[[3, 4]] = array[[4, 3]] if array[3] != array[4] else (array[3] - 1, array[4] + 1)
    else:
        array.reshape(-1)[100 % array.size] ^= 1 << 9
    broken = Encoded(damaged.spec, {**damaged.arrays, suffix: array})
    codecs.validate(broken)
    with pytest.raises(FormatError, match="must end in state 65536"):
        codecs.decode(broken)


@pytest.mark.parametrize(
    ("edit", "match"),
    [
        ({"base": None}, "base must be an integer"),
        ({"base": True}, "base must be an integer"),
        ({"base": 2**24}, "codes must lie"),
        ({"base": 2**62}, "codes must lie"),
        ({"symbols": 1}, "symbols must be"),
        ({"symbols": 257}, "symbols must be"),
        ({"shift": 9}, "shift must be"),
        ({"shift": -1}, "shift must be"),
        ({"words": -1}, "words must be"),
        ({"words": 2**40}, "words must be"),
        ({"words": "8"}, "words must be an integer"),
        ({"patches": -1}, "patches must be"),
        ({"patches": 10**9}, "exceed nnz"),
        ({"dtype": "I8"}, "codec int takes"),
        ({"steps": None}, "steps must be an object"),
        ({"steps": {"dtype": "F8_E4M3", "exponent": 0, "block": [1, 1]}}, "dtype must be one"),
        ({"steps": {"dtype": "F32", "exponent": 1, "block": [1, 1]}}, "exponent must be"),
        ({"steps": {"dtype": "F16", "exponent": 161, "block": [1, 1]}}, "exponent must be"),
        ({"steps": {"dtype": "F16", "exponent": 0.5, "block": [1, 1]}}, "exponent must be"),
        ({"steps": {"dtype": "F16", "exponent": 0, "block": [0, 1]}}, "block size must be"),
        ({"steps": {"dtype": "F16", "exponent": 0, "block": [1, 1001]}}, "block size must be"),
        ({"steps": {"dtype": "F16", "exponent": 0, "block": [1]}}, "block must be two"),
        ({"steps": {"dtype": "F16", "exponent": 0, "block": [1, []]}}, "cols must be an integer"),
    ],
)
def test_fields_that_are_refused(damaged: Encoded, edit: dict[str, object], match: str) -> None:
    fields = damaged.spec.to_dict() | edit
    with pytest.raises(FormatError, match=match):
        TensorSpec.from_dict(fields)


def test_other_codecs_have_no_codes() -> None:
    encoded = codecs.encode(np.ones(9, np.uint16), BF16, codec="raw")
    for read in (integer.codes_of, integer.steps_of):
        with pytest.raises(FormatError, match="has no"):
            read(encoded)
