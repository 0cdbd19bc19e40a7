"""The numpy codecs: every bit pattern comes back, and nothing malformed passes."""

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from endor import codecs
from endor.codecs import DTYPES, DType, Encoded, TensorSpec
from endor.errors import ConfigError, DTypeError, FormatError, ShapeError

CHOICES = [("auto", None), ("dense", None), ("raw", True), ("exp", True), ("exp", False)]
SIZES = [0, 1, 7, 64, 1023, 1024, 1025, 8192, 8193, 20_000]
SHAPES = [(), (0,), (3, 0), (1,), (5,), (3, 7), (2, 3, 5), (2, 3, 4, 5), (33, 129)]


def random_bits(rng: np.random.Generator, dtype: DType, shape: tuple[int, ...], density: float):
    """Return weights of a normal distribution, with some of them zeroed."""
    n = int(np.prod(shape))
    if dtype.signed:
        single = rng.normal(0, 0.02, n).astype("<f4").view("<u4")
        bits = (single >> np.uint32(32 - 8 * dtype.itemsize)).astype(dtype.uint)
    else:
        bits = rng.normal(0, 9, n).astype("i1").view("u1")
    keep = rng.random(n) < density
    return np.where(keep, bits, 0).astype(dtype.uint).reshape(shape)


def check_round_trip(bits: np.ndarray, dtype: DType, codec: str, bitmap: bool | None) -> Encoded:
    encoded = codecs.encode(bits, dtype, codec=codec, bitmap=bitmap)
    codecs.validate(encoded)
    decoded = codecs.decode(encoded)
    assert decoded.shape == bits.shape
    assert np.array_equal(decoded, bits)
    assert TensorSpec.from_dict(encoded.spec.to_dict()) == encoded.spec
    assert encoded.nbytes == sum(array.nbytes for array in encoded.arrays.values())
    return encoded


@pytest.mark.parametrize(("codec", "bitmap"), CHOICES)
@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
def test_round_trip_of_every_size(packable, codec, bitmap, density, rng):
    for size in SIZES:
        check_round_trip(random_bits(rng, packable, (size,), density), packable, codec, bitmap)


@pytest.mark.parametrize("shape", SHAPES)
def test_round_trip_of_every_shape(packable, shape, rng):
    check_round_trip(random_bits(rng, packable, shape, 0.5), packable, "auto", None)


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_round_trip_of_any_bits(data):
    dtype = data.draw(st.sampled_from([item for item in DTYPES.values() if item.packable]))
    raw = data.draw(st.binary(max_size=600 * dtype.itemsize))
    bits = np.frombuffer(raw[: len(raw) // dtype.itemsize * dtype.itemsize], dtype=dtype.uint)
    codec, bitmap = data.draw(st.sampled_from(CHOICES))
    check_round_trip(bits, dtype, codec, bitmap)


@pytest.mark.parametrize("codec", ["raw", "exp"])
def test_negative_zero_nan_and_infinity_keep_their_bits(codec):
    bits = np.array([0x8000, 0x7FC1, 0xFF81, 0x7F80, 0xFF80, 0x0001, 0x807F, 0, 0x3F80], "<u2")
    encoded = check_round_trip(bits, codecs.dtype("BF16"), codec, True)
    assert encoded.spec.nnz == 8


def test_a_dense_only_type_is_stored_dense(rng):
    bits = rng.integers(0, 2**63, 100).astype("<u8")
    assert check_round_trip(bits, codecs.dtype("I64"), "auto", None).spec.codec == "dense"
    with pytest.raises(ConfigError, match="I64"):
        codecs.encode(bits, codecs.dtype("I64"), codec="raw")


@pytest.mark.parametrize(
    ("density", "expected"), [(1.0, ("exp", False)), (0.5, ("exp", True)), (0.0, ("raw", True))]
)
def test_auto_takes_the_smallest(density, expected, rng):
    bits = random_bits(rng, codecs.dtype("BF16"), (64, 1024), density)
    chosen = codecs.encode(bits, codecs.dtype("BF16"))
    assert (chosen.spec.codec, chosen.spec.bitmap) == expected
    for codec, bitmap in CHOICES[1:]:
        assert (
            chosen.nbytes
            <= codecs.encode(bits, chosen.spec.dtype, codec=codec, bitmap=bitmap).nbytes
        )


def test_random_bits_stay_dense(rng):
    bits = rng.integers(1, 65536, 4096).astype("<u2")
    assert codecs.encode(bits, codecs.dtype("BF16")).spec.codec == "dense"


def test_half_pruned_normal_weights_need_six_bits(rng):
    weights = rng.normal(0, 0.02, (1024, 1024)).astype("<f4")
    weights[np.abs(weights) < np.median(np.abs(weights))] = 0
    bits = (weights.view("<u4") >> np.uint32(16)).astype("<u2")
    encoded = codecs.encode(bits, codecs.dtype("BF16"))
    assert encoded.spec.codec == "exp"
    assert encoded.spec.bits_per_weight < 6.06


def test_encode_refuses_what_does_not_fit():
    with pytest.raises(DTypeError, match="BF16"):
        codecs.encode(np.zeros(3, "<u4"), codecs.dtype("BF16"))
    with pytest.raises(ShapeError, match="does not hold"):
        codecs.encode(np.zeros(3, "<u2"), codecs.dtype("BF16"), shape=(2, 2))
    with pytest.raises(DTypeError, match="BF17"):
        codecs.dtype("BF17")
    with pytest.raises(ConfigError, match="raw"):
        codecs.encode(np.zeros(3, "<u2"), codecs.dtype("BF16"), codec="raw", bitmap=False)


def test_decode_writes_into_out(rng):
    bits = random_bits(rng, codecs.dtype("BF16"), (9, 50), 0.5)
    encoded = codecs.encode(bits, codecs.dtype("BF16"))
    out = np.full(450, 0xAAAA, "<u2")
    assert codecs.decode(encoded, out) is out
    assert np.array_equal(out, bits.reshape(-1))
    with pytest.raises(ShapeError):
        codecs.decode(encoded, np.zeros(449, "<u2"))


def sample(rng: np.random.Generator) -> Encoded:
    """Return a tensor with a bitmap, an odd tail, several groups and patches."""
    bits = random_bits(rng, codecs.dtype("BF16"), (20_001,), 0.5)
    bits[::700] = 0x7FC1
    encoded = codecs.encode(bits, codecs.dtype("BF16"), codec="exp", bitmap=True)
    assert encoded.spec.patches > 20
    return encoded


def damaged(encoded: Encoded, suffix: str, index: int, value: int) -> Encoded:
    arrays = {key: array.copy() for key, array in encoded.arrays.items()}
    arrays[suffix].reshape(-1)[index] = value
    return Encoded(encoded.spec, arrays)


@pytest.mark.parametrize(
    ("suffix", "index", "value", "message"),
    [
        ("tile_offsets", 0, 1, r"tile_offsets\[0\] must be 0"),
        ("tile_offsets", 5, 2**32 - 1, r"tile_offsets\[5\]"),
        ("tile_offsets", -1, 7, "tile_offsets"),
        ("bitmap", -1, 0xFF, "past element 20001"),
        ("bitmap", 2500, 0xFF, "past element 20001"),
        ("bitmap", 3, 0x00, "bits set"),
        ("planes", -1, 0x80, "past stored element"),
        ("patch_offsets", 0, 1, "patch_offsets must rise"),
        ("patch_offsets", 1, 2**32 - 1, "patch_offsets must rise"),
        ("patch_offsets", -1, 3, "patch_offsets must rise"),
        ("patch_ranks", 3, 65535, "inside its group"),
        ("patch_ranks", 1, 0, "strictly increasing"),
    ],
)
def test_validate_names_the_broken_rule(suffix, index, value, message, rng):
    encoded = sample(rng)
    codecs.validate(encoded)
    with pytest.raises(FormatError, match=message):
        codecs.validate(damaged(encoded, suffix, index, value))


def test_validate_checks_the_arrays_themselves(rng):
    encoded = sample(rng)
    arrays = dict(encoded.arrays)
    with pytest.raises(FormatError, match="arrays must be"):
        codecs.validate(Encoded(encoded.spec, {k: v for k, v in arrays.items() if k != "bitmap"}))
    with pytest.raises(FormatError, match="'bitmap' must be U8"):
        codecs.validate(Encoded(encoded.spec, arrays | {"bitmap": arrays["bitmap"][:-1]}))
    half = np.array([0x7C01, 0x3C00, 0x3C01, 0x3C02], "<u2")
    found = codecs.encode(half, codecs.dtype("F16"), codec="exp", bitmap=True)
    with pytest.raises(FormatError, match="patch exponent"):
        codecs.validate(damaged(found, "patch_exponents", 0, 32))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shape": [-1]}, "shape"),
        ({"shape": "x"}, "shape"),
        ({"shape": [2**30, 2**30]}, "elements"),
        ({"dtype": "BF17"}, "unknown dtype"),
        ({"codec": "zip"}, "unknown codec"),
        ({"bitmap": 1}, "bitmap"),
        ({"nnz": -1}, "nnz"),
        ({"nnz": True}, "nnz"),
        ({"nnz": 10**9}, "nnz"),
        ({"k": 0}, "k must be"),
        ({"k": 9}, "k must be"),
        ({"base": 254}, "base must be"),
        ({"patches": 10**9}, "patches"),
        ({"dtype": "I64"}, "only the dense codec"),
        ({"codec": "raw"}, "takes no exponent window"),
    ],
)
def test_a_hostile_spec_is_refused(change, message, rng):
    fields = sample(rng).spec.to_dict()
    with pytest.raises(FormatError, match=message):
        TensorSpec.from_dict(fields | change)


def test_sizes_of_a_spec():
    spec = TensorSpec((4, 1024), codecs.dtype("F32"), "exp", True, 100, k=3, base=9, patches=2)
    assert spec.n_tiles == 4
    assert [(array.suffix, array.shape) for array in spec.arrays] == [
        ("tile_offsets", (5,)),
        ("bitmap", (512,)),
        ("bytes", (3, 100)),
        ("planes", (3, 16)),
        ("patch_offsets", (2,)),
        ("patch_ranks", (2,)),
        ("patch_exponents", (2,)),
    ]
    assert spec.density == 100 / 4096
    assert spec.dense_nbytes == 16384


def test_codecs_need_numpy_only():
    script = "import sys, endor.codecs; sys.exit(any(m in sys.modules for m in ('torch', 'cupy')))"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
