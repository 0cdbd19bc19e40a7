"""The expansion kernels, emulated on the CPU, against the numpy reference, bit for bit."""

import numpy as np
import pytest

from endor import codecs
from endor.codecs import DTYPES, DType, Encoded

SIZES = [1, 7, 31, 1000, 1024, 1025, 4096, 8191, 8193, 20011]
DENSITIES = [0.0, 0.02, 0.5, 0.97, 1.0]


def sparse(rng: np.random.Generator, dtype: DType, n: int, density: float) -> np.ndarray:
    """Any bit pattern at all, NaN payloads and -0.0 among them, and zeros."""
    bits = rng.integers(0, 1 << (8 * dtype.itemsize), n, dtype=np.uint64).astype(dtype.uint)
    bits[bits == 0] = 1
    bits[rng.random(n) >= density] = 0
    return bits


def narrow(rng: np.random.Generator, dtype: DType, n: int, density: float) -> np.ndarray:
    """Weight-like: few exponents, and one element in a hundred from anywhere."""
    bits = sparse(rng, dtype, n, 1.0)
    field = ((1 << dtype.exponent_bits) - 1) << dtype.mantissa_bits
    width = 1 << min(3, dtype.exponent_bits - 1)
    exponents = rng.integers(1, 1 + width, n) + (0 if dtype.exponent_bits < 6 else 110)
    usual = rng.random(n) > 0.01
    near = (bits & dtype.uint.type(~field & (1 << 8 * dtype.itemsize) - 1)) | (
        exponents.astype(dtype.uint) << dtype.uint.type(dtype.mantissa_bits)
    )
    bits = np.where(usual, near, bits)
    bits[rng.random(n) >= density] = 0
    return bits


@pytest.mark.parametrize("name", ["BF16", "F16", "F32", "F8_E4M3", "I8"])
def test_raw(expand, rng, name):
    dtype = DTYPES[name]
    tensors = [
        codecs.encode(sparse(rng, dtype, n, density), dtype, codec="raw")
        for n in SIZES
        for density in DENSITIES
    ]
    for tensor in tensors:
        expand(tensor, launches=1)


@pytest.mark.parametrize("bitmap", [True, False])
def test_exp_of_weights(expand, rng, packable, bitmap):
    for n in SIZES:
        for density in DENSITIES if bitmap else [1.0]:
            bits = narrow(rng, packable, n, density)
            expand(codecs.encode(bits, packable, codec="exp", bitmap=bitmap), launches=1)


@pytest.mark.parametrize("bitmap", [True, False])
def test_exp_of_any_bits(expand, rng, packable, bitmap):
    """Exponents from everywhere and a narrow window: most elements are patches."""
    for n in (1, 1025, 9000, 17000):
        bits = sparse(rng, packable, n, 0.6)
        expand(exp_window(bits, packable, bitmap=bitmap, k=2, base=5), launches=1)


@pytest.mark.parametrize("bitmap", [True, False])
def test_exp_for_every_window(expand, rng, packable, bitmap):
    bits = narrow(rng, packable, 5001, 0.5)
    tensors = []
    for k in range(1, packable.exponent_bits + 1):
        span = 1 << packable.exponent_bits
        last = span - (1 << k) if packable.signed else span - 1
        for base in sorted({0, last // 2, last}):
            tensors.append(exp_window(bits, packable, bitmap=bitmap, k=k, base=base))
    expand(*tensors)


def exp_window(bits: np.ndarray, dtype: DType, *, bitmap: bool, k: int, base: int) -> Encoded:
    from endor.codecs import exp

    return exp.encode(bits, dtype, bitmap=bitmap, k=k, base=base)


@pytest.mark.parametrize("bitmap", [True, False])
def test_exp_compiled_for_its_window_alone(expand, rng, bitmap):
    bits = narrow(rng, DTYPES["BF16"], 5001, 0.5)
    expand(exp_window(bits, DTYPES["BF16"], bitmap=bitmap, k=3, base=108), exact=True)


def test_patches_in_one_tile_only(expand, rng):
    """Group borders: the last weight of a group, the first of the next, an empty group between."""
    dtype = DTYPES["BF16"]
    bits = np.full(4 * codecs.GROUP + 5, 0x3C12, dtype=np.uint16)
    for at in (0, codecs.GROUP - 1, codecs.GROUP, 3 * codecs.GROUP - 1, bits.size - 1):
        bits[at] = 0x7FC1
    bits[2 * codecs.GROUP - 1024 : 2 * codecs.GROUP] = 0
    for bitmap in (True, False):
        encoded = codecs.encode(bits, dtype, codec="exp", bitmap=bitmap)
        assert encoded.spec.patches
        expand(encoded)


def test_a_record_of_several_tensors_is_one_launch(expand, rng):
    """Tiles of one grid, tensors of unequal size and unequal numbers of planes."""
    dtype = DTYPES["BF16"]
    shapes = [1, 5000, 1024, 70, 12345, 2048, 1025, 4096]
    expand(
        *(codecs.encode(sparse(rng, dtype, n, 0.5), dtype, codec="raw") for n in shapes),
        launches=1,
        warps=4,
    )
    weights = [narrow(rng, dtype, n, 0.5) for n in shapes]
    expand(
        *(
            exp_window(bits, dtype, bitmap=True, k=2 + i % 3, base=108)
            for i, bits in enumerate(weights)
        ),
        launches=1,
        warps=4,
    )


def test_a_mixed_record_takes_a_launch_per_family(expand, rng):
    bf16, f32 = DTYPES["BF16"], DTYPES["F32"]
    expand(
        codecs.encode(sparse(rng, bf16, 3000, 0.5), bf16, codec="raw"),
        codecs.encode(narrow(rng, bf16, 3000, 0.5), bf16, codec="exp", bitmap=True),
        codecs.encode(narrow(rng, bf16, 3000, 1.0), bf16, codec="exp", bitmap=False),
        codecs.encode(sparse(rng, f32, 3000, 0.5), f32, codec="raw"),
        codecs.encode(sparse(rng, bf16, 3000, 0.5), bf16, codec="raw"),
        launches=4,
    )


def test_more_tensors_than_a_launch_holds(expand, rng):
    dtype = DTYPES["F16"]
    expand(
        *(codecs.encode(sparse(rng, dtype, 100 + n, 0.5), dtype, codec="raw") for n in range(11)),
        launches=2,
    )


def test_an_empty_tensor_needs_no_launch(expand):
    dtype = DTYPES["BF16"]
    expand(codecs.encode(np.zeros(0, dtype=np.uint16), dtype, codec="raw"), launches=0)


@pytest.mark.parametrize("codec", ["raw", "exp"])
def test_wrong_bytes_never_reach_outside(expand, rng, codec):
    """Noise in every array, and offsets that are wrong but near: all accesses stay inside."""
    dtype = DTYPES["BF16"]
    for n in (1025, 9000, 20000):
        bits = sparse(rng, dtype, n, 0.5)
        valid = codecs.encode(bits, dtype, codec="raw")
        if codec == "exp":
            valid = exp_window(bits, dtype, bitmap=True, k=3, base=112)
        noise = {
            suffix: rng.integers(0, 256, array.nbytes, dtype=np.uint8)
            .view(array.dtype)
            .reshape(array.shape)
            for suffix, array in valid.arrays.items()
        }
        expand(Encoded(valid.spec, noise), compare=False)
        near = dict(noise)
        for suffix, most in (
            ("tile_offsets", valid.spec.nnz),
            ("patch_offsets", valid.spec.patches),
        ):
            if suffix in near:
                shape = near[suffix].shape
                near[suffix] = rng.integers(0, 2 * most, shape).astype(np.uint32)
                near[suffix][::2] = 0
        expand(Encoded(valid.spec, near), compare=False)
