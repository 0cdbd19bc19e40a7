"""Kernels that are chosen once do what those do that are chosen at each call."""

import gc
import weakref

import numpy as np
import pytest

from endor import codecs, kernels
from endor.codecs import DTYPES, Encoded
from endor.errors import DTypeError, FormatError, ShapeError

CODECS = ["raw", "exp", "dense"]


def matrix(
    codec: str, name: str = "BF16", rows: int = 33, cols: int = 200, seed: int = 3
) -> Encoded:
    rng, cols = np.random.default_rng(seed), 200
    item = DTYPES[name]
    values = rng.standard_normal((rows, cols)).astype(np.float32)
    values[rng.random((rows, cols)) < 0.5] = 0
    if name == "BF16":
        bits = (values.view(np.uint32) >> 16).astype(np.uint16)
    else:
        bits = values.astype({"F16": np.float16, "F32": np.float32}[name]).view(item.uint)
    return kernels.encode(bits, item, codec=codec, bitmap=None if codec == "dense" else True)


def elsewhere(encoded: Encoded) -> Encoded:
    """The same tensor in other memory, as a record that was read again."""
    return Encoded(encoded.spec, {key: array.copy() for key, array in encoded.arrays.items()})


@pytest.mark.parametrize("name", ["BF16", "F16", "F32"])
@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("kernel", kernels.describe()["available"])
def test_elements(kernel: str, codec: str, name: str) -> None:
    encoded = matrix(codec, name)
    wanted = codecs.decode(encoded).reshape(-1)
    prepared = kernels.Prepared(encoded.spec, threads=2, kernel=kernel)
    for again in (encoded, encoded, elsewhere(encoded)):
        for start, stop in ((0, None), (0, 0), (1, 6600), (777, 4321)):
            out = np.zeros(6600, encoded.spec.dtype.uint)
            prepared.decode(again, out, start=start, stop=stop)
            part = wanted[start:stop]
            np.testing.assert_array_equal(out[: part.size], part)
            assert not out[part.size :].any()


@pytest.mark.parametrize("name", ["BF16", "F16", "F32"])
@pytest.mark.parametrize("codec", ["raw", "exp"])
@pytest.mark.parametrize("batch", [1, 3, 8])
def test_products(codec: str, name: str, batch: int) -> None:
    encoded = matrix(codec, name)
    x = matrix("raw", name, batch, 5)
    bits = codecs.decode(x).reshape(batch, 200)
    wanted = kernels.matvec(encoded, bits, np.empty((batch, 33), np.float32))
    prepared = kernels.Prepared(encoded.spec)
    if not prepared.multiplies:
        assert kernels.describe()["kernel"] == "numpy"
        return
    for again in (encoded, elsewhere(encoded)):
        for first in (0, 1, 32, 33):
            out = np.full((batch, 33 - first), np.nan, np.float32)
            prepared.matvec(again, bits.ctypes.data, batch, out.ctypes.data, first=first)
            assert np.array_equal(out.view(np.uint32), wanted[:, first:].view(np.uint32))


def test_what_is_not_multiplied() -> None:
    ones = np.ones((4, 4), np.uint16)
    flat = kernels.encode(ones.reshape(-1), DTYPES["BF16"], codec="raw", bitmap=True)
    bytes_ = kernels.encode(ones.astype(np.uint8), DTYPES["I8"], codec="raw")
    packed = kernels.encode(ones, DTYPES["BF16"], codec="raw", bitmap=True)
    for encoded, kernel in (
        (flat, None),
        (bytes_, None),
        (matrix("dense"), None),
        (packed, "numpy"),
    ):
        assert not kernels.Prepared(encoded.spec, kernel=kernel).multiplies


@pytest.mark.parametrize("codec", ["raw", "exp"])
def test_refusals(codec: str) -> None:
    encoded = matrix(codec)
    prepared = kernels.Prepared(encoded.spec)
    room = np.empty(6600, np.uint16)
    with pytest.raises(ShapeError):
        prepared.decode(encoded, room[:-1])
    with pytest.raises(ShapeError):
        prepared.decode(encoded, room, start=-1)
    with pytest.raises(ShapeError):
        prepared.decode(encoded, room, stop=6601)
    with pytest.raises(DTypeError):
        prepared.decode(encoded, room.view(np.int16))
    with pytest.raises(DTypeError):
        prepared.decode(encoded, np.empty(13200, np.uint16)[::2])
    fixed = room.copy()
    fixed.flags.writeable = False
    with pytest.raises(DTypeError):
        prepared.decode(encoded, fixed)
    if prepared.multiplies:
        with pytest.raises(ShapeError, match="first"):
            prepared.matvec(encoded, room.ctypes.data, 1, room.ctypes.data, first=34)
        for suffix, array in encoded.arrays.items():
            if array.size:
                cut = Encoded(encoded.spec, {**encoded.arrays, suffix: array[:-1]})
                with pytest.raises(ShapeError, match="array"):
                    prepared.decode(cut, room)


def test_arrays_that_contradict_each_other() -> None:
    encoded = matrix("raw")
    prepared = kernels.Prepared(encoded.spec)
    if not prepared.multiplies:
        pytest.skip("the reference trusts what was validated")
    wrong = elsewhere(encoded)
    wrong.arrays["bitmap"][...] = 0xFF
    wrong.arrays["tile_offsets"][1:] = 2**31
    with pytest.raises(FormatError):
        prepared.decode(wrong, np.empty(6600, np.uint16))


def test_what_was_seen_last_is_let_go_of() -> None:
    encoded = matrix("exp")
    prepared = kernels.Prepared(encoded.spec)
    prepared.decode(encoded, np.empty(6600, np.uint16))
    seen = weakref.ref(encoded)
    del encoded
    prepared.forget()
    gc.collect()
    assert seen() is None
