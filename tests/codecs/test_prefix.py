"""The first rows of a stored matrix decode to the first rows of the matrix, whatever the codec."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import endor
from endor import codecs, kernels
from endor.codecs import DTYPES, Encoded
from endor.codecs.prefix import prefix, row_step
from endor.errors import ShapeError

KINDS = ("raw", "exp", "exp without a bitmap", "int", "int with patches")


def matrix(kind: str, rows: int, cols: int, seed: int, dtype: str = "BF16") -> Encoded:
    rng = np.random.default_rng(seed)
    values = rng.standard_normal((rows, cols)).astype(np.float32)
    if kind.startswith("int"):
        if "patches" in kind:
            values[rng.random(values.shape) < 0.001] = 300.0
        return endor.compress(torch.from_numpy(values).to(torch.bfloat16), bits=3.0).data
    if "without" not in kind:
        values[rng.random(values.shape) < rng.random()] = 0
    values[rng.random(values.shape) < 0.002] = np.inf  # patches
    bits = values.view(np.uint32)
    if dtype == "BF16":
        bits = (bits >> 16).astype(np.uint16)
    codec = "raw" if kind == "raw" else "exp"
    return kernels.encode(bits, DTYPES[dtype], codec=codec, bitmap="without" not in kind, threads=1)


def as_stored(encoded: Encoded, rows: int) -> Encoded:
    """Return the prefix with arrays of its own, as a device gets it."""
    found = prefix(encoded, rows)
    arrays = {}
    for array in found.spec.arrays:
        flat = np.concatenate([*found.pieces[array.suffix], np.empty(0, np.uint8)])
        assert flat.nbytes == array.nbytes, array.suffix
        arrays[array.suffix] = flat.view(array.dtype.uint).reshape(array.unit_shape)
    return Encoded(found.spec, arrays)


def dense(encoded: Encoded) -> np.ndarray:
    out = np.empty(encoded.spec.numel, encoded.spec.dtype.uint)
    return kernels.decode(encoded, out, threads=1).reshape(encoded.spec.shape)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=25, deadline=None)
@given(
    cols=st.sampled_from([64, 96, 192, 512, 1024, 1536]),
    rows=st.integers(200, 700),
    seed=st.integers(0, 1000),
    share=st.floats(0, 1),
)
def test_the_first_rows_are_the_first_rows(kind, cols, rows, seed, share):
    encoded = matrix(kind, rows, cols, seed)
    step = row_step(encoded.spec)
    cuts = {0, int(share * (rows // step)) * step, rows} if step else {rows}
    for at in cuts:
        found = as_stored(encoded, at)
        assert found.spec.shape == (at, cols)
        np.testing.assert_array_equal(dense(found), dense(encoded)[:at])
        plain = codecs.decode(found).reshape(at, cols)
        np.testing.assert_array_equal(plain, dense(encoded)[:at])
        if at:
            found.spec.check()


@pytest.mark.parametrize("dtype", ["F32"])
def test_wider_elements_have_several_byte_planes(dtype):
    encoded = matrix("exp", 256, 1024, 3, dtype)
    np.testing.assert_array_equal(dense(as_stored(encoded, 64)), dense(encoded)[:64])


@pytest.mark.parametrize("kind", KINDS)
def test_the_other_rows_are_multiplied_where_they_lie(kind):
    encoded = matrix(kind, 300, 1024, 7)
    x = np.random.default_rng(1).standard_normal((3, 1024)).astype(np.float32)
    bits = (x.view(np.uint32) >> 16).astype(np.uint16)
    for kernel in (name for name in kernels.describe()["available"] if name != "numpy"):
        whole = kernels.matvec(encoded, bits, np.empty((3, 300), np.float32), kernel=kernel)
        for first in (0, 1, 32, 299, 300):
            for threads in (1, 2):
                run = kernels.Prepared(encoded.spec, kernel=kernel, threads=threads)
                out = np.full((3, 300 - first), np.nan, np.float32)
                run.matvec(encoded, bits.ctypes.data, 3, out.ctypes.data, first=first)
                np.testing.assert_array_equal(out.view(np.uint32), whole[:, first:].view(np.uint32))
    with pytest.raises(ShapeError, match="first"):
        run.matvec(encoded, bits.ctypes.data, 3, out.ctypes.data, first=301)


def test_what_cannot_be_cut_there_is_refused():
    encoded = matrix("raw", 64, 96, 1)
    step = row_step(encoded.spec)
    assert step == 32
    with pytest.raises(ShapeError, match="every 32 rows"):
        prefix(encoded, 33)
    with pytest.raises(ShapeError, match="every 32 rows"):
        prefix(encoded, 96)
    tall = matrix("raw", 8, 96, 1)
    assert row_step(tall.spec) == 0
    with pytest.raises(ShapeError):
        prefix(tall, 4)
    assert prefix(tall, 8).spec == tall.spec
