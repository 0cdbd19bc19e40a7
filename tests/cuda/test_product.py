"""The product kernel, emulated on the CPU, against a float64 product."""

import numpy as np
import pytest

from endor import codecs
from endor.codecs import DTYPES, DType, Encoded, exp
from endor.errors import DTypeError, ShapeError
from endor.kernels.gpu_product import plan_product, segment_nnz

SHAPES = [(5, 4096, 0.5), (1, 32, 0.5), (7, 576, 0.3), (6, 96, 0.5), (4, 1536, 0.0)]
SHAPES += [(3, 2048, 1.0), (9, 992, 0.7), (4, 2240, 0.02)]


def bits_of(values: np.ndarray, dtype: DType) -> np.ndarray:
    if dtype.name == "F16":
        return values.astype(np.float16).view(np.uint16)
    return (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)


def floats(bits: np.ndarray, dtype: DType) -> np.ndarray:
    if dtype.name == "F16":
        return bits.view(np.float16).astype(np.float64)
    return (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


def bits_of_weight(rng, rows: int, cols: int, density: float, dtype: DType) -> np.ndarray:
    bits = bits_of(rng.standard_normal((rows, cols)) * 0.5, dtype)
    bits[rng.random(bits.shape) >= density] = 0
    return bits


def weight(rng: np.random.Generator, rows: int, cols: int, density: float, dtype: DType) -> Encoded:
    return codecs.encode(bits_of_weight(rng, rows, cols, density, dtype), dtype, codec="raw")


@pytest.mark.parametrize("name", ["BF16", "F16"])
@pytest.mark.parametrize(
    ("batch", "tensor_cores"), [(1, True), (2, True), (3, True), (8, True), (1, False), (3, False)]
)
def test_product(multiply, rng, name, batch, tensor_cores):
    dtype = DTYPES[name]
    for rows, cols, density in SHAPES:
        packed = weight(rng, rows, cols, density, dtype)
        x = bits_of(rng.standard_normal((batch, cols)), dtype)
        expected = floats(x, dtype) @ floats(codecs.decode(packed), dtype).T
        for float_out in (True, False):
            for warps in (1, None) if float_out and batch == 1 else (None,):
                y = multiply(packed, x, float_out=float_out, warps=warps, tensor_cores=tensor_cores)
                got = y.astype(np.float64) if float_out else floats(y, dtype)
                scale = max(1.0, float(np.abs(expected).max()))
                assert np.abs(got - expected).max() / scale < (1e-5 if float_out else 6e-3)


@pytest.mark.parametrize(
    ("name", "batch", "tensor_cores"),
    [("BF16", 1, True), ("BF16", 8, True), ("BF16", 2, False), ("F16", 3, True)],
)
def test_exp_sums_as_raw_does(multiply, rng, name, batch, tensor_cores):
    """The same bits from either codec; patches in every place, NaN and infinity among them."""
    dtype = DTYPES[name]
    first = {"BF16": 120, "F16": 9}[name]
    for at, (rows, cols, density) in enumerate([*SHAPES, (21, 1024, 0.5), (40, 416, 0.9)]):
        bits = bits_of_weight(rng, rows, cols, density, dtype)
        bits[:, -1] = bits_of(np.full(rows, 3e-5), dtype)
        x = bits_of(rng.standard_normal((batch, cols)), dtype)
        k = (2, 3, 4, dtype.exponent_bits)[at % 4]
        base = min(first, (1 << dtype.exponent_bits) - (1 << k))
        packed = exp.encode(bits, dtype, bitmap=True, k=k, base=base)
        assert packed.spec.patches or k == dtype.exponent_bits or density == 0
        alike = {"rows": 16, "warps": 1 + at % 3, "tensor_cores": tensor_cores}
        expected = multiply(codecs.encode(bits, dtype, codec="raw"), x, **alike)
        found = multiply(packed, x, **alike)
        assert np.array_equal(found.view(np.uint32), expected.view(np.uint32)), (rows, cols, k)


@pytest.mark.parametrize("batch", [1, 8])
def test_exp_without_a_bitmap(multiply, rng, batch):
    dtype = DTYPES["BF16"]
    for rows, cols in ((5, 4096), (19, 2272)):
        bits = bits_of_weight(rng, rows, cols, 1.0, dtype)
        bits[bits == 0] = 1
        x = bits_of(rng.standard_normal((batch, cols)), dtype)
        packed = exp.encode(bits, dtype, bitmap=False, k=2, base=124)
        assert packed.spec.patches
        alike = {"rows": 16, "warps": 2}
        expected = multiply(codecs.encode(bits, dtype, codec="raw"), x, **alike)
        assert np.array_equal(
            multiply(packed, x, **alike).view(np.uint32), expected.view(np.uint32)
        )


@pytest.mark.parametrize("codec", ["raw", "exp"])
def test_rows_of_a_warp(multiply, rng, codec):
    """Every shape of a segment; with 1 to 8 columns, and blocks that end inside a warp's rows."""
    dtype = DTYPES["BF16"]
    bits = bits_of_weight(rng, 37, 1504, 0.5, dtype)
    packed = codecs.encode(bits, dtype, codec=codec)
    for batch, rows in ((1, 8), (1, 32), (2, 4), (4, 16), (8, 32)):
        x = bits_of(rng.standard_normal((batch, 1504)), dtype)
        expected = floats(x, dtype) @ floats(bits, dtype).T
        y = multiply(packed, x, rows=rows)
        assert np.abs(y - expected).max() / np.abs(expected).max() < 1e-5


def test_infinite_and_absent_weights_stay_in_their_row(multiply, rng):
    """The products beside the diagonal, which mix rows and columns, must never leak."""
    dtype = DTYPES["BF16"]
    values = rng.standard_normal((4, 256))
    values[1, 37] = np.inf
    values[:, 64:] = 0
    x = rng.standard_normal((2, 256))
    x[:, 200] = np.nan
    y = multiply(codecs.encode(bits_of(values, dtype), dtype, codec="raw"), bits_of(x, dtype))
    assert np.isfinite(y[:, [0, 2, 3]]).sum() == 0, "a NaN of x reaches every row, as in a matmul"
    x[:, 200] = 0
    y = multiply(codecs.encode(bits_of(values, dtype), dtype, codec="raw"), bits_of(x, dtype))
    assert np.isinf(y[:, 1]).all()
    assert np.isfinite(y[:, [0, 2, 3]]).all()


def test_the_sum_does_not_depend_on_the_run(multiply, rng):
    packed = weight(rng, 6, 4096, 0.5, DTYPES["BF16"])
    x = bits_of(rng.standard_normal((1, 4096)), DTYPES["BF16"])
    first, again = (multiply(packed, x, warps=4) for _ in range(2))
    assert np.array_equal(first, again)


def test_segment_nnz_is_the_fullest_segment(rng):
    dtype = DTYPES["BF16"]
    bits = np.zeros((3, 2080), dtype=np.uint16)
    bits[1, 1000:1100] = 1
    bits[2, 2048:] = 1
    encoded = codecs.encode(bits, dtype, codec="raw")
    assert segment_nnz(encoded.spec, encoded.arrays["bitmap"]) == 76


def test_what_the_kernel_does_not_take(rng):
    bf16, f32 = DTYPES["BF16"], DTYPES["F32"]
    good = weight(rng, 4, 64, 0.5, bf16)
    at = {suffix: 4096 for suffix in good.arrays}
    for dtype, shape, codec, found in (
        (bf16, (4, 48), "raw", "multiple of 32, got 48"),
        (bf16, (256,), "raw", r"not shape \(256,\)"),
        (f32, (4, 64), "raw", "not raw in F32"),
        (f32, (4, 64), "exp", "not exp in F32"),
        (bf16, (4, 64), "dense", "not dense in BF16"),
    ):
        bits = np.ones(shape, dtype=dtype.uint)
        spec = codecs.encode(bits, dtype, codec=codec).spec
        with pytest.raises(DTypeError, match=f"{found}.*expand the weight"):
            plan_product(spec, at, x=0, y=0, batch=1)
    with pytest.raises(ShapeError, match=r"1\.\.8, got 9"):
        plan_product(good.spec, at, x=0, y=0, batch=9)
    with pytest.raises(ShapeError, match="x must start at a multiple of 16, got 0x8"):
        plan_product(good.spec, at, x=8, y=0, batch=1)
    with pytest.raises(ShapeError, match="values must start at a multiple of 16"):
        plan_product(good.spec, at | {"values": 8}, x=0, y=0, batch=1)


def test_shared_memory_bounds_the_block(rng):
    """Half of what the smallest card has, 64 KiB a multiprocessor, and more."""
    spec = weight(rng, 64, 8192, 1.0, DTYPES["BF16"]).spec
    at = {suffix: 0 for suffix in ("tile_offsets", "bitmap", "values")}
    for limit in (31 << 10, 48 << 10, 96 << 10):
        for batch in (1, 2, 4, 8):
            launch = plan_product(spec, at, x=0, y=0, batch=batch, shared_limit=limit)
            assert launch.shared_bytes <= limit
        assert launch.grid * dict(launch.kernel.defines)["ENDOR_ROWS"] >= 64


@pytest.mark.parametrize("codec", ["raw", "exp"])
@pytest.mark.parametrize("cols", [32, 1024, 5120, 9216, 11008, 14336])
@pytest.mark.parametrize("batch", [1, 2, 4, 8])
def test_no_warp_is_idle(cols, batch, codec):
    spec = codecs.encode(np.ones((8, cols), dtype=np.uint16), DTYPES["BF16"], codec=codec).spec
    at = {array.suffix: 0 for array in spec.arrays}
    launch = plan_product(spec, at, x=0, y=0, batch=batch, shared_limit=100 << 10)
    segments = -(-cols // (4096 // dict(launch.kernel.defines)["ENDOR_ROWS"]))
    warps = launch.block // 32
    assert (warps - 1) * -(-segments // warps) < segments
