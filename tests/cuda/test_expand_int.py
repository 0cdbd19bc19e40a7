"""The expansion of codec `int`, emulated on the CPU, against the numpy reference, bit for bit."""

import numpy as np
import pytest

from endor.codecs import DTYPES, Encoded, integer
from endor.errors import ShapeError
from endor.kernels.gpu_launch import Part
from endor.kernels.gpu_plan import plan_expansion

from ..support.int_cases import cases, codes_of, steps_of


def test_every_kind(expand, rng):
    for _, encoded in cases(rng):
        expand(encoded, launches=1)


@pytest.mark.parametrize("warps", [1, 3, 8])
def test_chunks_of_a_block(expand, rng, warps):
    encoded = integer.encode(codes_of(rng, (130, 1024), 2.0), 0.5, DTYPES["BF16"])
    expand(encoded, launches=1, warps=warps)


def test_tensors_of_a_record_share_a_launch(expand, rng):
    """Unequal sizes and tables; low bits, and steps that lie otherwise, take another launch."""
    bf16 = DTYPES["BF16"]
    tensors = [
        integer.encode(codes_of(rng, (rows, 640), spread), steps_of(rng, (640,)), bf16)
        for rows, spread in ((1, 0.5), (200, 2.0), (52, 30.0), (103, 4.0))
    ]
    expand(*tensors[:2], tensors[3], launches=1)
    expand(*tensors, integer.encode(codes_of(rng, (64, 64), 1.0), 0.5, bf16), launches=3)
    many = [integer.encode(codes_of(rng, (2, 64), 1.0), 0.5, bf16) for _ in range(9)]
    expand(*many, launches=2)


def test_wrong_bytes_never_reach_outside(expand, rng):
    """Noise in every array: all accesses stay inside."""
    for shape, spread, steps in (((70, 1000), 2.0, (1000,)), ((40, 999), 30.0, (40, 1))):
        valid = integer.encode(codes_of(rng, shape, spread), steps_of(rng, steps), DTYPES["BF16"])
        assert valid.spec.patches
        for kept in ((), ("chunk_offsets", "patch_offsets"), ("frequencies", "chunk_offsets")):
            noise = {
                suffix: array
                if suffix in kept
                else rng.integers(0, 256, array.nbytes, dtype=np.uint8)
                .view(array.dtype)
                .reshape(array.shape)
                for suffix, array in valid.arrays.items()
            }
            expand(Encoded(valid.spec, noise), compare=False)


def test_rows_that_are_too_long():
    """Nothing so large is made: the spec alone says it."""
    small = integer.encode(np.ones((1, 64), dtype=np.int32), 0.5, DTYPES["BF16"]).spec
    coding = small.coding
    assert coding is not None
    large = type(small)((1, 1 << 31), small.dtype, "int", False, 1 << 31, coding=coding)
    with pytest.raises(ShapeError, match=r"rows of less than 2\*\*31 elements.*on the CPU"):
        plan_expansion([Part(large, {}, 0)])
