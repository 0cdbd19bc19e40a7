"""The kernels' machine code, executed, against the numpy reference.

The machine faults at what the emulator cannot see: what the compiler made of it.
"""

import numpy as np
import pytest

from endor import codecs
from endor.codecs import DTYPES, Encoded, exp, integer
from endor.kernels.gpu_launch import Part
from endor.kernels.gpu_plan import plan_expansion

from ...support.device_arrays import Output, Record
from ...support.int_cases import cases, codes_of
from .simulator import ARCHITECTURES, BF16, Simulator, weights

SIZES = [1, 7, 1000, 1024, 1025, 8193, 20011]
DENSITIES = [0.0, 0.02, 0.5, 1.0]

pytestmark = pytest.mark.parametrize("architecture", ARCHITECTURES)


def any_bits(rng, dtype, n: int, density: float) -> np.ndarray:
    bits = rng.integers(0, 1 << (8 * dtype.itemsize), n, dtype=np.uint64).astype(dtype.uint)
    bits[bits == 0] = 1
    bits[rng.random(n) >= density] = 0
    return bits


@pytest.mark.parametrize("name", ["BF16", "F32", "I8"])
def test_raw(simulator: Simulator, rng, architecture, name):
    dtype = DTYPES[name]
    tensors = [
        codecs.encode(any_bits(rng, dtype, n, density), dtype, codec="raw")
        for n in SIZES
        for density in DENSITIES
    ]
    simulator.expand(tensors, architecture)


@pytest.mark.parametrize("bitmap", [True, False])
@pytest.mark.parametrize("name", ["BF16", "F16", "F32", "F8_E4M3", "I8"])
def test_exp(simulator: Simulator, rng, architecture, name, bitmap):
    """Any bits at all in a narrow window: most elements are patches."""
    dtype = DTYPES[name]
    tensors = []
    for n in SIZES:
        for density in DENSITIES if bitmap else [1.0]:
            bits = any_bits(rng, dtype, n, density)
            tensors.append(exp.encode(bits, dtype, bitmap=bitmap, k=2, base=5))
    simulator.expand(tensors, architecture)


@pytest.mark.parametrize("bitmap", [True, False])
def test_exp_of_weights(simulator: Simulator, rng, architecture, bitmap):
    tensors = [
        codecs.encode(weights(rng, (n,), density), BF16, codec="exp", bitmap=bitmap)
        for n in SIZES
        for density in ((0.3, 0.7) if bitmap else (1.0,))
    ]
    simulator.expand(tensors, architecture, warps=4)


def expand_each(simulator: Simulator, architecture: str, tensors) -> None:
    for name, encoded in tensors:
        try:
            simulator.expand([encoded], architecture)
        except (AssertionError, pytest.fail.Exception) as error:
            pytest.fail(f"{name}: {error}")


def test_int(simulator: Simulator, rng, architecture):
    small = [(name, item) for name, item in cases(rng) if item.spec.numel <= 5_000]
    assert len(small) > 12
    expand_each(simulator, architecture, small)


@pytest.mark.slow
def test_int_of_more_elements(simulator: Simulator, rng, architecture):
    large = [(name, item) for name, item in cases(rng) if item.spec.numel > 5_000]
    expand_each(simulator, architecture, large)


@pytest.mark.parametrize("batch", [1, 2, 3, 8])
@pytest.mark.parametrize("shape", [(5, 2240), (3, 96), (40, 1024), (7, 4096)])
def test_product(simulator: Simulator, rng, architecture, shape, batch):
    bits, x = weights(rng, shape, 0.5), weights(rng, (batch, shape[1]))
    wide = [(part.astype(np.uint32) << 16).view(np.float32).astype(float) for part in (x, bits)]
    expected = wide[0] @ wide[1].T
    for codec in ("raw", "exp"):
        packed = codecs.encode(bits, BF16, codec=codec)
        y, _ = simulator.multiply(packed, x, architecture)
        assert np.abs(y - expected).max() <= 1e-5 * np.abs(expected).max(), codec


@pytest.mark.parametrize(("k", "bitmap"), [(1, True), (2, True), (3, False), (4, True), (6, True)])
@pytest.mark.parametrize("batch", [1, 5])
def test_product_of_exp_has_the_bits_of_raw(simulator, rng, architecture, k, bitmap, batch):
    """Patches in every group, rows that cross groups; and a batch that fills no power of two."""
    bits, x = weights(rng, (24, 1120), 0.5 if bitmap else 1.0), weights(rng, (batch, 1120))
    packed = exp.encode(bits, BF16, bitmap=bitmap, k=k, base=119)
    assert packed.spec.patches
    alike = {"warp_rows": 16, "warps": 2}
    found, _ = simulator.multiply(packed, x, architecture, **alike)
    raw = codecs.encode(bits, BF16, codec="raw")
    expected, _ = simulator.multiply(raw, x, architecture, **alike)
    assert np.array_equal(found.view(np.uint32), expected.view(np.uint32))


@pytest.mark.parametrize("codec", ["raw", "exp", "int"])
def test_wrong_bytes_never_reach_outside(simulator: Simulator, rng, architecture, codec):
    """Noise in every array: all accesses stay inside, though some read what nobody wrote."""
    bits = any_bits(rng, BF16, 9001, 0.5)
    valid = codecs.encode(bits, BF16, codec="raw")
    if codec == "exp":
        valid = exp.encode(bits, BF16, bitmap=True, k=3, base=112)
    elif codec == "int":
        valid = integer.encode(codes_of(rng, (9, 1000), 30.0), 0.5, BF16)
    noise = {
        suffix: rng.integers(0, 256, array.nbytes, dtype=np.uint8)
        .view(array.dtype)
        .reshape(array.shape)
        for suffix, array in valid.arrays.items()
    }
    record, output = Record([Encoded(valid.spec, noise)]), Output(valid.spec.numel, BF16.uint)
    (launch,) = plan_expansion([Part(valid.spec, record.addresses[0], output.address)])
    simulator.launch(launch, architecture, [record.region], [output.region], unwritten=True)
    output.check_canaries()
