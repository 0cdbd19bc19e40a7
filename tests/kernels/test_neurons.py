"""Matrices that are stored transposed: the same elements, and products that skip zeros."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from endor import codecs, kernels
from endor.codecs import DTYPES, DType, Encoded, TensorSpec
from endor.errors import FormatError
from endor.kernels import native, neurons

from ..conftest import KERNELS, need
from .conftest import STYLES, elements
from .test_matvec import floats, rounded, weights

KINDS = ["BF16", "F16", "F32"]
HOW: list[tuple[codecs.CodecChoice, bool | None]] = [("raw", None), ("exp", True), ("exp", False)]


def turned(
    weight: np.ndarray,
    item: DType,
    how: tuple[codecs.CodecChoice, bool | None],
    together: int = 0,
) -> Encoded:
    """Return `weight` stored transposed, in bundles of `together` neurons where that is not 0."""
    bits = np.ascontiguousarray(weight.T)
    stored = codecs.encode(bits, item, codec=how[0], bitmap=how[1])
    if together:
        rows = min(together, max(len(bits), 1))
        return kernels.bundles.encode(bits, stored.spec, rows, 1, kernels.select())
    return Encoded(stored.spec.turned(), stored.arrays)


@pytest.mark.parametrize("kernel", KERNELS)
@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    name=st.sampled_from(["BF16", "F16", "F32", "F8_E4M3"]),
    rows=st.integers(0, 90),
    cols=st.integers(0, 90),
    density=st.sampled_from([0.0, 0.3, 1.0]),
    how=st.sampled_from(HOW),
    style=st.sampled_from(STYLES),
    cut=st.tuples(st.floats(0, 1), st.floats(0, 1)),
    threads=st.integers(1, 3),
    together=st.sampled_from([0, 0, 1, 3]),
)
def test_elements_keep_their_bits_and_their_places(
    kernel: str,
    seed: int,
    name: str,
    rows: int,
    cols: int,
    density: float,
    how: tuple[codecs.CodecChoice, bool | None],
    style: str,
    cut: tuple[float, float],
    threads: int,
    together: int,
) -> None:
    need(kernel)
    item, rng = DTYPES[name], np.random.default_rng(seed)
    weight = elements(rng, item, rows * cols, density, style).reshape(rows, cols)
    encoded = turned(weight, item, how, together)
    codecs.validate(encoded)
    assert np.array_equal(codecs.decode(encoded), weight)
    start, stop = sorted(round(at * weight.size) for at in cut)
    out = np.full(stop - start + 3, 77, dtype=item.uint)
    kernels.decode(encoded, out, start=start, stop=stop, threads=threads, kernel=kernel)
    assert np.array_equal(out[: stop - start], weight.reshape(-1)[start:stop])
    assert (out[stop - start :] == 77).all()


@pytest.mark.parametrize("kernel", KERNELS)
@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    name=st.sampled_from(KINDS),
    rows=st.one_of(st.sampled_from([0, 64, 1024, 2048]), st.integers(0, 1500)),
    cols=st.integers(0, 40),
    density=st.sampled_from([0.0, 0.3, 1.0]),
    how=st.sampled_from(HOW),
    batch=st.integers(0, 9),
    zeros=st.sampled_from([0.0, 0.5, 0.95, 1.0]),
    single=st.booleans(),
    threads=st.integers(1, 4),
    together=st.sampled_from([0, 1, 3]),
)
def test_products_against_float64(
    kernel: str,
    seed: int,
    name: str,
    rows: int,
    cols: int,
    density: float,
    how: tuple[codecs.CodecChoice, bool | None],
    batch: int,
    zeros: float,
    single: bool,
    threads: int,
    together: int,
) -> None:
    need(kernel)
    item, rng = DTYPES[name], np.random.default_rng(seed)
    weight = weights(rng, item, rows, cols, density)
    x = rng.standard_normal((batch, cols)).astype(np.float32)
    x[:, rng.random(cols) < zeros] = -0.0
    given_x = x if single else rounded(x, item)
    out = np.full((batch, rows), np.nan, dtype=np.float32)
    encoded = turned(weight, item, how, together)
    assert kernels.matvec(encoded, given_x, out, threads=threads, kernel=kernel) is out
    wide = floats(given_x, item)
    exact = wide @ floats(weight, item).T
    bound = np.abs(wide) @ np.abs(floats(weight, item)).T * 2.0**-24 * (cols + 1)
    assert (np.abs(out - exact) <= bound).all()


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("rows", [320, 1024, 1300])
def test_threads_and_bundles_do_not_change_the_sum(
    compiled: str, how: tuple[codecs.CodecChoice, bool | None], rows: int, rng: np.random.Generator
) -> None:
    item = DTYPES["BF16"]
    weight = weights(rng, item, rows, 700, 0.5)
    x = rounded(rng.standard_normal((3, 700)) * (rng.random(700) < 0.5), item)
    outs = []
    for together in (0, 1, 4):
        encoded = turned(weight, item, how, together)
        for threads in (1, 2, 3, 7):
            out = np.empty((3, rows), dtype=np.float32)
            outs.append(kernels.matvec(encoded, x, out, threads=threads, kernel=compiled))
    assert all(np.array_equal(outs[0].view(np.uint32), out.view(np.uint32)) for out in outs)


@pytest.mark.parametrize("how", HOW)
def test_rows_of_idle_neurons_are_not_read(
    compiled: str, how: tuple[codecs.CodecChoice, bool | None], rng: np.random.Generator
) -> None:
    """Whatever lies in their bytes: the sums are those of the whole tensor, to the bit."""
    item, rows, cols = DTYPES["BF16"], 1024, 64
    encoded = turned(weights(rng, item, rows, cols, 0.5), item, how)
    x = np.zeros((1, cols), dtype=np.float32)
    x[0, [3, 4, 40]] = rng.standard_normal(3)
    whole = kernels.matvec(encoded, x, np.empty((1, rows), np.float32), kernel=compiled)
    offsets = encoded.arrays.get("tile_offsets", np.arange(0, 65537, 1024))
    spoiled = {suffix: array.copy() for suffix, array in encoded.arrays.items()}
    for row in range(cols):
        if row in (3, 4, 40):
            continue
        first, last = int(offsets[row]), int(offsets[row + 1])
        for suffix, array in spoiled.items():
            flat = array.reshape(len(array) if array.ndim == 2 else 1, -1)
            if suffix == "bitmap":
                flat[:, 128 * row : 128 * row + 128] = 255
            elif suffix == "planes":
                flat[:, -(-first // 8) : last // 8] = 255
            elif suffix in ("values", "bytes"):
                flat[:, first:last] = 255
    out = np.empty((1, rows), np.float32)
    kernels.matvec(Encoded(encoded.spec, spoiled), x, out, kernel=compiled)
    assert np.array_equal(out.view(np.uint32), whole.view(np.uint32))


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("kernel", KERNELS)
def test_bundles_of_idle_neurons_are_not_read(
    kernel: str, how: tuple[codecs.CodecChoice, bool | None], rng: np.random.Generator
) -> None:
    need(kernel)
    item, rows, cols, together = DTYPES["BF16"], 1024, 64, 2
    encoded = turned(weights(rng, item, rows, cols, 0.5), item, how, together)
    x = np.zeros((1, cols), dtype=np.float32)
    x[0, [3, 4, 40]] = rng.standard_normal(3)
    whole = kernels.matvec(encoded, x, np.empty((1, rows), np.float32), kernel=kernel)
    offsets = 8 * encoded.arrays["bundle_offsets"].astype(np.int64)
    spoiled = encoded.arrays["bundles"].copy()
    for one in set(range(cols // together)) - {3 // 2, 4 // 2, 40 // 2}:
        spoiled[offsets[one] : offsets[one + 1]] = 255
    out = np.empty((1, rows), np.float32)
    arrays = {**encoded.arrays, "bundles": spoiled}
    kernels.matvec(Encoded(encoded.spec, arrays), x, out, kernel=kernel)
    assert np.array_equal(out.view(np.uint32), whole.view(np.uint32))


def test_arrays_that_contradict_each_other(compiled: str, rng: np.random.Generator) -> None:
    item = DTYPES["BF16"]
    encoded = turned(weights(rng, item, 64, 64, 0.5), item, ("raw", None))
    arrays = dict(encoded.arrays)
    arrays["tile_offsets"] = arrays["tile_offsets"].copy()
    arrays["tile_offsets"][1] += 1
    out = np.empty((1, 64), np.float32)
    with pytest.raises(FormatError, match="contradict"):
        kernels.matvec(
            Encoded(encoded.spec, arrays), np.ones((1, 64), np.float32), out, kernel=compiled
        )


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    batch=st.integers(0, 9),
    cols=st.integers(0, 300),
    zeros=st.sampled_from([0.0, 0.5, 0.97, 1.0]),
    dtype=st.sampled_from([np.uint16, np.uint32, np.float32]),
)
def test_active_neurons_are_the_columns_with_a_number(
    seed: int, batch: int, cols: int, zeros: float, dtype: type
) -> None:
    rng = np.random.default_rng(seed)
    bits = rng.integers(0, 1 << 16, (batch, cols), dtype=np.uint32) << np.uint32(16)
    bits[rng.random((batch, cols)) < zeros] &= np.uint32(0x80000000)
    x = (bits >> np.uint32(16)).astype(np.uint16) if dtype == np.uint16 else bits.view(dtype)
    wanted = np.flatnonzero(((bits << np.uint32(1)) != 0).any(axis=0))
    with pytest.MonkeyPatch.context() as patch:
        for library in (None, native.load()[0]):
            patch.setattr(native, "load", lambda library=library: (library, ""))
            found = neurons.active_neurons(x)
            assert found.dtype == np.uint32
            assert np.array_equal(found, wanted)


def test_only_what_is_zero_in_all_rows_is_idle() -> None:
    x = np.array([[0.0, -0.0, 1.0, 0.0], [0.0, -0.0, 0.0, np.nan]], dtype=np.float32)
    assert neurons.active_neurons(x).tolist() == [2, 3]
    assert neurons.active_neurons(rounded(x, DTYPES["BF16"])).tolist() == [2, 3]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"transposed": 1}, "true or false"),
        ({"codec": "dense"}, "takes no transposed matrix"),
        ({"shape": [4, 4, 4]}, "only a matrix"),
        ({"shape": [64]}, "only a matrix"),
    ],
)
def test_a_spec_that_makes_no_sense(change: dict[str, object], said: str) -> None:
    spec = TensorSpec((8, 8), DTYPES["BF16"], "raw", True, 10, transposed=True)
    assert TensorSpec.from_dict(spec.to_dict()) == spec
    with pytest.raises(FormatError, match=said):
        TensorSpec.from_dict(spec.to_dict() | change)
