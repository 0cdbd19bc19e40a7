"""Products with chosen rows alone: the bits of the whole product, and nothing else is read."""

import ctypes

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from endor import codecs, kernels
from endor.codecs import DTYPES, Encoded
from endor.errors import BackendError, FormatError, ShapeError
from endor.kernels import chosen, native, select

from ..conftest import KERNELS, need
from .test_matvec import KINDS, floats, rounded, weights

HOW: list[tuple[codecs.CodecChoice, bool | None]] = [("raw", None), ("exp", True), ("exp", False)]


def product(
    encoded: Encoded, x: np.ndarray, rows: np.ndarray, kernel: str, threads: int = 2
) -> np.ndarray:
    out = np.full((len(x), encoded.spec.shape[0]), 77, dtype=np.float32)
    chosen.product(encoded, x, rows.astype(np.uint32), out, threads, select(kernel))
    return out


@pytest.mark.parametrize("kernel", KERNELS)
@settings(max_examples=80, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    name=st.sampled_from(KINDS),
    rows=st.integers(0, 40),
    cols=st.one_of(st.integers(0, 40).map(lambda k: 64 * k), st.integers(0, 1500)),
    density=st.sampled_from([0.0, 0.3, 0.5, 1.0]),
    share=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    how=st.sampled_from(HOW),
    batch=st.integers(0, 10),
    single=st.booleans(),
    threads=st.integers(1, 4),
)
def test_chosen_rows_have_the_bits_of_all(
    kernel: str,
    seed: int,
    name: str,
    rows: int,
    cols: int,
    density: float,
    share: float,
    how: tuple[codecs.CodecChoice, bool | None],
    batch: int,
    single: bool,
    threads: int,
) -> None:
    need(kernel)
    item, rng = DTYPES[name], np.random.default_rng(seed)
    weight = weights(rng, item, rows, cols, density)
    encoded = codecs.encode(weight, item, codec=how[0], bitmap=how[1])
    x = rng.standard_normal((batch, cols)).astype(np.float32)
    x = x if single else rounded(x, item)
    few = np.flatnonzero(rng.random(rows) < share)
    out = product(encoded, x, few, kernel, threads)
    whole = kernels.matvec(encoded, x, np.empty_like(out), kernel=kernel)
    others = np.setdiff1d(np.arange(rows), few)
    assert (out[:, others] == 77).all()
    if kernel == "numpy":
        exact = floats(x, item) @ floats(weight, item).T
        bound = np.abs(floats(x, item)) @ np.abs(floats(weight, item)).T * 2.0**-24 * (cols + 1)
        assert (np.abs(out - exact) <= bound)[:, few].all()
    else:
        assert np.array_equal(out[:, few].view(np.uint32), whole[:, few].view(np.uint32))


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("cols", [1024, 2048])
def test_other_rows_are_not_read(
    compiled: str, how: tuple[codecs.CodecChoice, bool | None], cols: int, rng: np.random.Generator
) -> None:
    """Whatever lies in their bytes."""
    item, rows, few = DTYPES["BF16"], 50, np.array([3, 4, 31, 49])
    encoded = codecs.encode(weights(rng, item, rows, cols, 0.5), item, codec=how[0], bitmap=how[1])
    x = rounded(rng.standard_normal((1, cols)), item)
    whole = product(encoded, x, few, compiled)
    offsets = encoded.arrays.get("tile_offsets", np.arange(0, rows * cols + 1, 1024))
    spoiled = {suffix: array.copy() for suffix, array in encoded.arrays.items()}
    tiles = cols // 1024
    for row in np.setdiff1d(np.arange(rows), few):
        first, last = int(offsets[tiles * row]), int(offsets[tiles * (row + 1)])
        for suffix, array in spoiled.items():
            flat = array.reshape(len(array) if array.ndim == 2 else 1, -1)
            if suffix == "bitmap":
                flat[:, 128 * tiles * row : 128 * tiles * (row + 1)] = 255
            elif suffix == "planes":
                flat[:, -(-first // 8) : last // 8] = 255
            elif suffix in ("values", "bytes"):
                flat[:, first:last] = 255
    out = product(Encoded(encoded.spec, spoiled), x, few, compiled)
    assert np.array_equal(out.view(np.uint32), whole.view(np.uint32))


def test_a_row_that_is_not_there(rng: np.random.Generator) -> None:
    item = DTYPES["BF16"]
    encoded = codecs.encode(weights(rng, item, 8, 64, 0.5), item, codec="raw")
    x = rounded(np.ones((1, 64)), item)
    with pytest.raises(ShapeError, match="must be below 8 rows, got 8"):
        product(encoded, x, np.array([0, 8]), "auto")


def test_the_library_checks_too(compiled: str, rng: np.random.Generator) -> None:
    """A row past the end is no read past the arrays."""
    item = DTYPES["BF16"]
    encoded = codecs.encode(weights(rng, item, 8, 64, 0.5), item, codec="raw")
    x, rows = np.ones((1, 64), np.float32), np.array([9], dtype=np.uint32)
    out, view = np.zeros((1, 8), np.float32), native.view(encoded)
    status = native.library().endor_matvec_chosen(
        *(select(compiled), ctypes.byref(view), 0, 8, 64, rows.ctypes.data, 1, x.ctypes.data, 2, 1),
        *(out.ctypes.data, 1),
    )
    with pytest.raises(BackendError):
        native.check(status)


def test_arrays_that_contradict_each_other(compiled: str, rng: np.random.Generator) -> None:
    item = DTYPES["BF16"]
    encoded = codecs.encode(weights(rng, item, 20, 100, 0.5), item, codec="raw")
    arrays = dict(encoded.arrays)
    arrays["tile_offsets"] = arrays["tile_offsets"].copy()
    arrays["tile_offsets"][1] += 1
    x = np.ones((1, 100), np.float32)
    with pytest.raises(FormatError, match="contradict"):
        product(Encoded(encoded.spec, arrays), x, np.arange(20), compiled)


def test_what_it_takes(rng: np.random.Generator) -> None:
    item = DTYPES["BF16"]
    weight = weights(rng, item, 64, 64, 0.5)
    raw = codecs.encode(weight, item, codec="raw").spec
    assert chosen.takes_rows(raw)
    assert not chosen.takes_rows(raw.turned())
    assert not chosen.takes_rows(codecs.encode(weight, item, codec="dense").spec)
    byte = codecs.encode(weight.astype(np.uint8), DTYPES["U8"], codec="raw").spec
    assert not chosen.takes_rows(byte)
