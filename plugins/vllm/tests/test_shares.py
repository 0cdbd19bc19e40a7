"""What of a stored matrix a layer takes: the right bits, in the stored form where it can be."""

import itertools

import numpy as np
import pytest
import torch

import endor
from endor import codecs, kernels
from endor.codecs import Encoded
from endor.dtypes import torch_dtype
from endor.packed import bits_of
from endor_vllm.placement import ALIGN, READABLE, Placement, join_dense
from endor_vllm.shares import Stored, mark, take

ROWS, COLS = 96, 160


def dense_of(encoded: Encoded) -> torch.Tensor:
    codecs.validate(encoded)
    out = torch.empty(encoded.spec.shape, dtype=torch_dtype(encoded.spec.dtype))
    kernels.decode(encoded, bits_of(out).reshape(-1))
    return out


def equal(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    a, b = (np.ascontiguousarray(bits_of(each)) for each in (found, wanted))
    return a.shape == b.shape and bool((a == b).all())


def weight(dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    values = torch.randn(ROWS, COLS, generator=torch.Generator().manual_seed(0)) * 0.02
    values[values.abs() < 0.01] = 0
    values[3, 5], values[4, 6], values[5, 7] = -0.0, float("nan"), float("inf")
    return values.to(dtype)


def stored_as(codec: str, dtype: torch.dtype) -> Encoded:
    if codec == "int":
        codes = torch.randint(-9, 9, (ROWS, COLS), generator=torch.Generator().manual_seed(1))
        steps = torch.rand(1, COLS, generator=torch.Generator().manual_seed(2)) + 0.5
        return endor.pack_codes(codes, steps, dtype).data
    return endor.compress(weight(dtype), codec=codec).data


CUTS = (
    (slice(0, ROWS), slice(0, COLS)),
    (slice(48, 96), slice(0, COLS)),
    (slice(7, 8), slice(0, COLS)),
    (slice(0, ROWS), slice(80, 160)),
    (slice(13, 77), slice(33, 34)),
)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("codec", ["dense", "raw", "exp", "int"])
def test_a_share_has_the_bits_of_the_dense_one(codec, dtype):
    encoded = stored_as(codec, dtype)
    for rows, cols in CUTS:
        dense = dense_of(encoded)
        stored = mark(dense, "w", encoded)
        share = dense[rows, cols]
        found, part = take(share)
        assert found is stored
        assert stored.taken
        assert equal(dense_of(part), share)
        if codec == "int":
            assert part.spec.codec == "int"
        if share.shape == dense.shape:
            assert part.spec == encoded.spec


@pytest.mark.parametrize(
    ("shape", "block"),
    [
        ((1, 1), (ROWS, COLS)),
        ((ROWS, 1), (1, COLS)),
        ((1, COLS), (ROWS, 1)),
        ((ROWS // 32, COLS // 32), (32, 32)),
        ((ROWS, COLS // 32), (1, 32)),
        ((3, 4), (40, 48)),
    ],
)
def test_codes_keep_their_steps_in_every_form(shape, block):
    generator = torch.Generator().manual_seed(3)
    codes = torch.randint(-300, 300, (ROWS, COLS), generator=generator)
    steps = torch.rand(shape, generator=generator) + 0.1
    packed = endor.pack_codes(codes, steps, torch.float32, block=block)
    bounds = itertools.product((0, 1, 32, 39, 40), (1, 32, 33, 56))
    for (row, rows), (col, cols) in itertools.product(bounds, ((0, COLS), (32, 64), (50, 31))):
        dense = endor.decompress(packed)
        mark(dense, "w", packed.data)
        share = dense[row : row + rows, col : col + cols]
        part = take(share)[1]
        assert part.spec.codec == "int"
        assert equal(dense_of(part), share)


def changed_in_place(dense: torch.Tensor) -> torch.Tensor:
    return dense.mul_(2)


def transposed(dense: torch.Tensor) -> torch.Tensor:
    return dense.T


def permuted(dense: torch.Tensor) -> torch.Tensor:
    return dense.view(2, ROWS // 2, COLS).transpose(0, 1).reshape(ROWS, COLS)


def reshaped(dense: torch.Tensor) -> torch.Tensor:
    return dense.view(ROWS // 2, 2 * COLS)


def converted(dense: torch.Tensor) -> torch.Tensor:
    return dense.to(torch.float16)


@pytest.mark.parametrize(
    "change",
    [changed_in_place, transposed, permuted, reshaped, converted],
    ids=lambda f: f.__name__,
)
@pytest.mark.parametrize("codec", ["exp", "int"])
def test_what_the_models_code_makes_of_a_tensor_counts(codec, change):
    encoded = stored_as(codec, torch.bfloat16)
    dense = dense_of(encoded)
    stored = mark(dense, "w", encoded)
    made = change(dense)
    found, part = take(made)
    assert found is None
    assert not stored.taken
    assert equal(dense_of(part), made)


def test_shares_of_one_layer_lie_together_and_are_found():
    kinds = [("exp", torch.bfloat16), ("raw", torch.bfloat16), ("int", torch.float32)]
    parts = [(ROWS * at, stored_as(codec, dtype)) for at, (codec, dtype) in enumerate(kinds)]
    parts.append((ROWS * len(kinds), stored_as("dense", torch.bfloat16)))
    placement = Placement.of(parts)
    data = np.full(placement.nbytes + 777, 255, dtype=np.uint8)
    placement.fill(parts, data)
    assert placement.nbytes % ALIGN == READABLE
    assert not data[placement.nbytes - READABLE :].any()
    elsewhere = data.copy()
    for (row, bound), (wanted_row, encoded) in zip(placement.bind(elsewhere), parts, strict=True):
        assert row == wanted_row
        assert all(np.shares_memory(array, elsewhere) for array in bound.arrays.values())
        assert equal(dense_of(bound), dense_of(encoded))


def test_dense_shares_are_joined_and_packed_ones_are_not():
    dense = [(ROWS, stored_as("dense", torch.bfloat16)), (0, stored_as("dense", torch.bfloat16))]
    (only,) = join_dense(dense)
    assert only[0] == 0
    assert equal(dense_of(only[1]), torch.cat([weight(), weight()]))
    mixed = [(ROWS, stored_as("dense", torch.bfloat16)), (0, stored_as("exp", torch.bfloat16))]
    assert [row for row, _ in join_dense(mixed)] == [0, ROWS]


def test_the_memory_of_a_dense_share_is_its_own():
    encoded = stored_as("dense", torch.bfloat16)
    dense = dense_of(encoded)
    mark(dense, "w", encoded)
    part = take(dense)[1]
    encoded.arrays[""][:] = 0
    assert equal(dense_of(part), weight())
    assert isinstance(dense.endor, Stored)
