"""Codec `fields` in numpy: layouts, round trips, choice, and one bad input per error."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from endor import codecs, kernels
from endor.codecs import DTYPES, DType, Encoded, TensorSpec, fields
from endor.codecs.layout import Fields, Layout, Part
from endor.errors import FormatError, ShapeError

U8 = DTYPES["U8"]
Q4_0 = Layout(18, ((Part(2, 16, 4, 16),),))
Q6_K = Layout(210, ((Part(0, 128, 4, 64), Part(128, 64, 2, 32)), (Part(192, 16, 8),)))
Q5_0 = Layout(22, ((Part(6, 16, 4, 16), Part(2, 4, 1)),))
PLAIN = [Layout(1, ((Part(0, 1, bits),),)) for bits in (1, 2, 4, 8)]


def encode(raw: np.ndarray, layout: Layout, dtype: DType = U8) -> Encoded:
    made = fields.encode(raw.view(dtype.uint), dtype, layout)
    assert made is not None
    return made


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    layout=st.sampled_from([*PLAIN, Q4_0, Q5_0, Q6_K]),
    blocks=st.sampled_from([1, 2, 33, 500]),
    top=st.sampled_from([1, 2, 17, 256]),
)
def test_round_trip(seed: int, layout: Layout, blocks: int, top: int) -> None:
    raw = np.random.default_rng(seed).integers(0, top, (blocks, layout.block)).astype(np.uint8)
    encoded = encode(raw, layout)
    codecs.validate(encoded)
    assert TensorSpec.from_dict(encoded.spec.to_dict()) == encoded.spec
    assert np.array_equal(codecs.decode(encoded), raw)
    held = encoded.arrays.get("rest")
    assert (0 if held is None else held.shape[1]) == layout.rest_nbytes()


def test_symbols_are_in_the_order_that_the_layout_says() -> None:
    block = np.zeros((1, 18), dtype=np.uint8)
    block[0, 2:] = np.arange(16) | (15 - np.arange(16)) << 4
    assert Q4_0.take(0, block).tolist() == [*range(16), *range(15, -1, -1)]
    plain = PLAIN[2].take(0, np.array([[0x21], [0x43]], dtype=np.uint8))
    assert plain.tolist() == [1, 2, 3, 4]
    five = np.zeros((1, 22), dtype=np.uint8)
    five[0, 6], five[0, 2] = 0xA3, 0b1000_0001
    assert Q5_0.take(0, five)[[0, 7, 16]].tolist() == [3 + 16, 16, 10]


def test_symbols_of_two_parts_are_those_of_gguf() -> None:
    gguf = pytest.importorskip("gguf")
    raw = np.random.default_rng(3).integers(0, 256, (4, 210)).astype(np.uint8)
    raw[:, 192:208], raw[:, 208:] = 1, np.array([1.0], dtype="<f2").view(np.uint8)
    values = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType.Q6_K)
    symbols = Q6_K.take(0, raw).astype(np.float32).reshape(4, 256)
    assert np.array_equal(symbols - 32, values)


@pytest.mark.parametrize("layout", [PLAIN[2], PLAIN[3], Q6_K])
def test_pieces_do_not_show(monkeypatch: pytest.MonkeyPatch, layout: Layout) -> None:
    blocks = 150_000 // layout.block
    raw = np.random.default_rng(5).integers(0, 99, (blocks, layout.block)).astype(np.uint8)
    whole = encode(raw, layout)
    monkeypatch.setattr(fields, "PIECE_SYMBOLS", 1)
    parts = encode(raw, layout)
    assert parts.spec == whole.spec
    for suffix, array in whole.arrays.items():
        assert np.array_equal(parts.arrays[suffix], array), suffix
    some = np.empty(777, dtype=np.uint8)
    fields.decode(parts, some, 65_500)
    assert np.array_equal(some, raw.reshape(-1)[65_500 : 65_500 + 777])


@pytest.mark.usefixtures("each_kernel")
@pytest.mark.parametrize("layout", [PLAIN[2], PLAIN[3], Q5_0, Q6_K])
def test_kernels_give_the_same_bytes_and_elements(layout: Layout) -> None:
    raw = np.random.default_rng(6).integers(0, 50, (300, layout.block)).astype(np.uint8)
    wanted, found = encode(raw, layout), kernels.fields.encode(raw, U8, layout)
    assert found is not None
    assert found.spec == wanted.spec
    for suffix, array in wanted.arrays.items():
        assert np.array_equal(found.arrays[suffix], array), suffix
    out = np.empty(raw.size - 20, dtype=np.uint8)
    kernels.decode(found, out, start=10, stop=raw.size - 10)
    assert np.array_equal(out, raw.reshape(-1)[10:-10])


def test_the_smallest_layout_is_chosen_and_dear_fields_are_left_out() -> None:
    rng = np.random.default_rng(7)
    codes = np.clip(np.rint(rng.standard_normal(400_000) * 2.5), -8, 7).astype(np.int8) & 15
    raw = (codes[::2] | codes[1::2] << 4).astype(np.uint8)
    chosen = fields.choose(raw, fields.layouts(DTYPES["I32"]))
    assert chosen is not None
    sizes = [encode(raw, layout).nbytes for layout in PLAIN[1:]]
    assert encode(raw, chosen).nbytes == min(sizes) < 0.87 * raw.size
    noise = rng.integers(0, 256, 100_000).astype(np.uint8)
    assert fields.choose(noise, fields.layouts(U8)) is None
    blocks = rng.integers(0, 256, (2000, 210)).astype(np.uint8)
    blocks[:, 192:208] = 3
    kept = fields.choose(blocks.reshape(-1), [Q6_K])
    assert kept is not None
    assert kept.fields == Q6_K.fields[1:]


def test_blocks_must_divide_the_tensor() -> None:
    with pytest.raises(ShapeError, match="19 bytes are not whole blocks of 18"):
        fields.encode(np.zeros(19, dtype=np.uint8), U8, Q4_0)
    with pytest.raises(ShapeError, match="0 bytes are not whole blocks"):
        fields.encode(np.zeros(0, dtype=np.uint8), U8, PLAIN[3])


def one(*part: int, block: int = 8) -> Layout:
    return Layout(block, ((Part(*part),),))


BAD = {
    "block": (one(0, 1, 8, block=0), "block must be"),
    "no fields": (Layout(4, ()), "fields must be"),
    "no parts": (Layout(4, ((),)), "parts"),
    "bits": (one(0, 3, 3), "bits of a part"),
    "outside": (one(5, 4, 8), "must lie in its block"),
    "empty": (one(5, 0, 8), "must lie in its block"),
    "span": (one(0, 4, 4, 3), "span 3 must divide"),
    "no span": (one(0, 4, 4, 0), "span 0 must divide"),
    "shared": (Layout(4, ((Part(0, 2, 8),), (Part(1, 1, 8),))), "must not share"),
    "unequal": (Layout(4, ((Part(0, 1, 4), Part(1, 2, 4)),)), "equally many"),
    "wide": (Layout(4, ((Part(0, 1, 8), Part(1, 1, 8)),)), "8 bits at most"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_wrong_layout_is_refused(case: str) -> None:
    layout, message = BAD[case]
    spec = TensorSpec((16,), U8, "fields", False, 16, fields=Fields(layout, 0))
    with pytest.raises(FormatError, match=message):
        spec.check()
    with pytest.raises(FormatError):
        TensorSpec.from_dict(spec.to_dict())


@pytest.mark.parametrize(
    ("member", "value", "message"),
    [
        ("block", None, "block and words"),
        ("block", True, "block and words"),
        ("words", -1, "block and words"),
        ("words", 1 << 40, "words must be 0..32"),
        ("fields", {}, "list of lists"),
        ("fields", [3], "list of lists"),
        ("fields", [[[0, 1, 8]]], "four integers"),
        ("fields", [[[0, 1, 8, 1.0]]], "four integers"),
        ("block", 3, "whole blocks of 3"),
    ],
)
def test_a_wrong_member_is_refused(member: str, value: object, message: str) -> None:
    members = encode(np.arange(16, dtype=np.uint8), PLAIN[3]).spec.to_dict()
    with pytest.raises(FormatError, match=message):
        TensorSpec.from_dict({**members, member: value})


def test_damaged_arrays_are_refused() -> None:
    encoded = encode(np.arange(40_000, dtype=np.uint32).view(np.uint8) // 3, PLAIN[2])
    for suffix, at, value, message in [
        ("frequencies", 0, 5000, "frequencies must sum"),
        ("chunk_offsets", 1, 4_000_000, "chunk_offsets must rise"),
        ("states", 0, 3, "states must be at least"),
    ]:
        array = encoded.arrays[suffix].copy()
        array.reshape(-1)[at] = value
        with pytest.raises(FormatError, match=message):
            codecs.validate(Encoded(encoded.spec, {**encoded.arrays, suffix: array}))
    words = encoded.arrays["words"].copy()
    words[100] ^= 77
    with pytest.raises(FormatError, match="must end in state"):
        codecs.decode(Encoded(encoded.spec, {**encoded.arrays, "words": words}))
    with pytest.raises(FormatError, match="contradict"):
        dataclasses.replace(encoded.spec, codec="dense").check()
