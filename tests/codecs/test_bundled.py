"""Matrices in bundles: every bit comes back, both ways give the same bytes, damage is found."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from endor import codecs, kernels
from endor.codecs import DTYPES, CodecChoice, Encoded, TensorSpec, bundled
from endor.codecs.bundles import HEAD, Bundles
from endor.errors import FormatError
from endor.kernels import bundles

from ..conftest import KERNELS, need
from ..kernels.conftest import STYLES, elements

HOW: list[tuple[CodecChoice, bool | None]] = [("raw", None), ("exp", True), ("exp", False)]


def made(
    stored: np.ndarray,
    name: str,
    how: tuple[CodecChoice, bool | None],
    rows: int,
    kernel: str | None = "numpy",
) -> Encoded:
    """Return the matrix whose transposed one is `stored`, in bundles."""
    form = codecs.encode(stored, DTYPES[name], codec=how[0], bitmap=how[1]).spec
    return bundles.encode(stored, form, rows, 2, kernels.select(kernel))


@pytest.mark.parametrize("kernel", KERNELS)
@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    name=st.sampled_from(["BF16", "F16", "F32", "F8_E4M3", "F8_E5M2", "I8", "U8"]),
    neurons=st.integers(0, 60),
    hidden=st.one_of(st.integers(0, 90), st.sampled_from([1024, 1500, 9000])),
    density=st.sampled_from([0.0, 0.3, 1.0]),
    how=st.sampled_from(HOW),
    style=st.sampled_from(STYLES),
    together=st.integers(1, 7),
)
def test_bundles_give_every_bit_back(
    kernel: str,
    seed: int,
    name: str,
    neurons: int,
    hidden: int,
    density: float,
    how: tuple[CodecChoice, bool | None],
    style: str,
    together: int,
) -> None:
    need(kernel)
    item, rng = DTYPES[name], np.random.default_rng(seed)
    stored = elements(rng, item, neurons * hidden, density, style).reshape(neurons, hidden)
    rows = min(together, max(neurons, 1))
    encoded = made(stored, name, how, rows, kernel)
    codecs.validate(encoded)
    assert TensorSpec.from_dict(encoded.spec.to_dict()) == encoded.spec
    assert np.array_equal(codecs.decode(encoded), stored.T)
    reference = made(stored, name, how, rows)
    assert reference.spec == encoded.spec
    for suffix, array in reference.arrays.items():
        assert np.array_equal(array, encoded.arrays[suffix]), suffix
    out = np.empty(stored.size, item.uint)
    kernels.decode(encoded, out, kernel=kernel, threads=2)
    assert np.array_equal(out.reshape(hidden, neurons), stored.T)


def sample(how: tuple[CodecChoice, bool | None], *, rows: int = 3) -> Encoded:
    """Return a matrix of 10 neurons, of 1300 elements each, that has patches."""
    rng = np.random.default_rng(3)
    stored = elements(rng, DTYPES["BF16"], 13000, 0.5 if how[1] is not False else 1.0, "weights")
    stored = stored.reshape(10, 1300)
    stored[:, 7] = 0x7F00
    encoded = made(stored, "BF16", how, rows)
    assert (encoded.spec.patches > 0) == (how[0] == "exp")
    return encoded


def spoilt(encoded: Encoded, at: int, value: int) -> Encoded:
    """Return a matrix with one byte of its bundles changed."""
    data = encoded.arrays["bundles"].copy()
    assert data[at] != value
    data[at] = value
    return Encoded(encoded.spec, {**encoded.arrays, "bundles": data})


def place(encoded: Encoded, index: int, suffix: str) -> int:
    """Return the first byte of an array of a bundle."""
    part = bundled.part(encoded, index)
    base = encoded.arrays["bundles"].ctypes.data
    return int(part.arrays[suffix].ctypes.data - base)


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("index", [0, 1, 3])
def test_counts_that_contradict_a_bundle(
    how: tuple[CodecChoice, bool | None], index: int, compiled: str
) -> None:
    encoded = sample(how)
    at = 8 * int(encoded.arrays["bundle_offsets"][index])
    for byte in (at, at + 2, at + 4, at + 7):
        for value in (0, 255):
            if encoded.arrays["bundles"][byte] == value:
                continue
            bad = spoilt(encoded, byte, value)
            with pytest.raises(FormatError, match="bundle"):
                codecs.validate(bad)
            if byte != at:  # a smaller count may fit the same length
                with pytest.raises(FormatError, match="contradict"):
                    kernels.decode(bad, np.empty(13000, np.uint16), kernel=compiled)


def test_two_counts_whose_sums_are_right() -> None:
    encoded = sample(("exp", True))
    first, second = (8 * int(encoded.arrays["bundle_offsets"][index]) for index in (0, 1))
    data = encoded.arrays["bundles"].copy()
    data[first : first + 4].view("<u4")[0] += 1
    data[second : second + 4].view("<u4")[0] -= 1
    with pytest.raises(FormatError, match=r"bundle [01]: "):
        codecs.validate(Encoded(encoded.spec, {**encoded.arrays, "bundles": data}))


@pytest.mark.parametrize(
    ("how", "suffix", "shift", "rule"),
    [
        (("raw", None), "tile_offsets", 4, "tile_offsets must count"),
        (("raw", None), "bitmap", 0, "must count the bits"),
        (("raw", None), "bitmap", 490, "past element 3900"),
        (("exp", False), "patch_offsets", 0, "patch_offsets must rise"),
        (("exp", False), "patch_offsets", 4, "patch_offsets must rise"),
        (("exp", False), "patch_ranks", 1, "must lie inside its group|strictly"),
    ],
)
@pytest.mark.parametrize("index", [0, 2])
def test_arrays_inside_a_bundle_that_break_a_rule(
    how: tuple[CodecChoice, bool | None], suffix: str, shift: int, rule: str, index: int
) -> None:
    encoded = sample(how)
    at = place(encoded, index, suffix) + shift
    with pytest.raises(FormatError, match=rf"bundle {index}: .*({rule})"):
        codecs.validate(spoilt(encoded, at, int(encoded.arrays["bundles"][at]) ^ 0x80))


@pytest.mark.parametrize("how", HOW)
def test_every_gap_and_every_last_bit_is_checked(how: tuple[CodecChoice, bool | None]) -> None:
    """A changed byte that decodes to the same elements would be a second way to write them."""
    encoded = sample(how, rows=1)
    offsets = encoded.arrays["bundle_offsets"]
    for index in (0, 4, 9):
        used = np.zeros(8 * int(offsets[index + 1] - offsets[index]), dtype=np.bool_)
        begin = 8 * int(offsets[index])
        used[:HEAD] = True
        part = bundled.part(encoded, index)
        for array in part.spec.arrays:
            at = place(encoded, index, array.suffix) - begin
            used[at : at + array.nbytes] = True
        gaps = np.flatnonzero(~used)
        assert gaps.size
        for at in gaps.tolist():
            with pytest.raises(FormatError, match=f"bundle {index}: bytes behind"):
                codecs.validate(spoilt(encoded, begin + at, 1))
        if how[0] == "exp":
            last = place(encoded, index, "planes") + part.spec.plane_nbytes - 1
            with pytest.raises(FormatError, match=f"bundle {index}: bits of a plane"):
                codecs.validate(spoilt(encoded, last, 0x80))


def test_offsets_that_do_not_rise() -> None:
    encoded = sample(("exp", True))
    for index, value in ((0, 1), (1, 0), (2, 1 << 31), (4, 3)):
        offsets = encoded.arrays["bundle_offsets"].copy()
        offsets[index] = value
        with pytest.raises(FormatError, match="bundle"):
            codecs.validate(Encoded(encoded.spec, {**encoded.arrays, "bundle_offsets": offsets}))


@pytest.mark.parametrize("how", HOW)
def test_any_changed_byte_is_refused_or_harmless(
    how: tuple[CodecChoice, bool | None], compiled: str, rng: np.random.Generator
) -> None:
    """Kernels read and write inside their buffers whatever the bytes are."""
    encoded = sample(how)
    out = np.empty(13000, np.uint16)
    x = np.zeros((1, 10), np.float32)
    x[0, [1, 5, 9]] = 1
    sums = np.empty((1, 1300), np.float32)
    for at in rng.integers(0, encoded.arrays["bundles"].size, 300).tolist():
        old = int(encoded.arrays["bundles"][at])
        bad = spoilt(encoded, at, old ^ int(rng.integers(1, 256)))
        for call in (
            lambda bad=bad: codecs.validate(bad),
            lambda bad=bad: kernels.decode(bad, out, kernel=compiled),
            lambda bad=bad: kernels.matvec(bad, x, sums, kernel=compiled),
        ):
            try:
                call()
            except FormatError:
                continue


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"transposed": False}, "stored transposed takes bundles"),
        ({"bundles": {"rows": 0, "nbytes": 800}}, "1..8 rows"),
        ({"bundles": {"rows": 9, "nbytes": 800}}, "1..8 rows"),
        ({"bundles": {"rows": 2, "nbytes": 801}}, "multiple of 8"),
        ({"bundles": {"rows": 2, "nbytes": 24}}, "multiple of 8"),
        ({"bundles": {"rows": 2}}, "rows and nbytes"),
        ({"bundles": {"rows": True, "nbytes": 800}}, "rows and nbytes"),
        ({"bundles": [2, 800]}, "rows and nbytes"),
        ({"bundles": None}, "rows and nbytes"),
    ],
)
def test_a_spec_that_makes_no_sense(change: dict[str, object], said: str) -> None:
    spec = TensorSpec((9, 8), DTYPES["BF16"], "raw", True, 10, transposed=True)
    spec = replace(spec, bundles=Bundles(2, 800))
    assert TensorSpec.from_dict(spec.to_dict()) == spec
    with pytest.raises(FormatError, match=said):
        TensorSpec.from_dict(spec.to_dict() | change)
