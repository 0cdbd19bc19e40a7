"""Tier `decoded`: the same elements without their entropy code, in memory of their own."""

from pathlib import Path

import numpy as np
import pytest
import torch

from endor import kernels
from endor.codecs import CodecChoice, Encoded
from endor.errors import ChecksumError, FormatError
from endor.offload.decoded import decode_unit
from endor.packed import bits_of
from endor.planning import Placement
from endor.storage import HostBuffer

from ..support.packed_files import Packed, make_packed

SHAPES = [(64, 128), (33, 192), (128, 1024), (7, 65)]


def decoded(packed: Packed, staging: int = 0, rest: str = "decoded") -> Placement:
    names = [unit.name for unit in packed.units]
    tiers = dict.fromkeys(names, "decoded") | dict.fromkeys(names[2:], rest)
    return Placement(tiers, staging)


@pytest.fixture(params=["BF16", "F32"])
def exp(tmp_path: Path, request: pytest.FixtureRequest) -> Packed:
    return make_packed(tmp_path / "w.safetensors", SHAPES, dtype=request.param, codec="exp")


@pytest.mark.parametrize("rest", ["decoded", "resident", "disk"])
def test_products_and_matrices_are_those_of_the_packed_ones(exp: Packed, rest: str) -> None:
    dtype = torch.bfloat16 if exp.dense["w0"].dtype == np.uint16 else torch.float32
    placement = decoded(exp, exp.largest, rest)
    plain = exp.store(exp.placement(resident=range(len(SHAPES))), dtype)
    store = exp.store(placement, dtype)
    try:
        store.preload()
        for name, bits in exp.dense.items():
            inputs = torch.randn(2, bits.shape[1]).to(dtype)
            ours, theirs = store.weights[name], plain.weights[name]
            dense = bits_of(ours.dense())
            assert dense.tobytes() == bits.tobytes()
            product = ours.product(inputs)
            exact = inputs.double() @ theirs.dense().double().T
            torch.testing.assert_close(product.double(), exact, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(product, theirs.product(inputs), rtol=1e-5, atol=1e-5)
    finally:
        store.close()
        plain.close()


def test_they_take_their_own_memory_and_leave_the_packed_ones(exp: Packed) -> None:
    mover = exp.mover(decoded(exp))
    try:
        mover.preload()
        assert mover.held_nbytes == sum(unit.decoded_nbytes for unit in exp.units)
        assert not mover.streams
        (buffer,) = mover.buffers
        assert buffer.nbytes == mover.held_nbytes
        for state in mover.states.values():
            bound = state.fixed
            assert bound is not None
            for name, tensor in bound.items():
                assert tensor.spec == state.spec(name)
                assert tensor.spec.codec == "raw"
                assert all(np.shares_memory(a, buffer.array) for a in tensor.arrays.values())
            exp.check(state.unit.name, bound)
        calls = exp.disk.calls
        for state in mover.states.values():
            mover.take(state)
        assert exp.disk.calls == calls
    finally:
        mover.close()


@pytest.mark.parametrize("codec", ["raw", "dense"])
def test_what_has_no_entropy_code_stays_as_it_is(tmp_path: Path, codec: CodecChoice) -> None:
    packed = make_packed(tmp_path / "w.safetensors", SHAPES, codec=codec)
    mover = packed.mover(decoded(packed))
    try:
        mover.preload()
        for state in mover.states.values():
            assert state.fixed is not None
            assert state.fixed[state.unit.name].spec.codec == codec
            packed.check(state.unit.name, state.fixed)
    finally:
        mover.close()


def test_a_damaged_record_is_refused_and_may_be_read_again(exp: Packed) -> None:
    unit = exp.units[1]
    with exp.path.open("r+b") as file:
        file.seek(unit.record.offset + 3)
        (byte,) = file.read(1)
        file.seek(unit.record.offset + 3)
        file.write(bytes([byte ^ 1]))
    mover = exp.mover(decoded(exp))
    try:
        with pytest.raises(ChecksumError, match="w1"):
            mover.preload()
        with exp.path.open("r+b") as file:
            file.seek(unit.record.offset + 3)
            file.write(bytes([byte]))
        mover.preload()
        fixed = mover.states["w1"].fixed
        assert fixed is not None
        exp.check("w1", fixed)
    finally:
        mover.close()


def test_a_stored_zero_is_not_taken_for_an_element(exp: Packed) -> None:
    unit = exp.units[0]
    item = unit.layout.tensors["w0"].spec.dtype
    subnormal = np.ones(SHAPES[0], item.uint)
    subnormal[::2] = 0
    made = kernels.encode(subnormal, item, codec="exp", bitmap=True)
    kernels.decode(made, np.empty(subnormal.size, item.uint))
    arrays = {name: array.copy() for name, array in made.arrays.items()}
    arrays["bytes"].reshape(-1)[0] = 0
    zeroed = Encoded(made.spec, arrays)
    with pytest.raises(FormatError, match=f"w0.*{made.spec.nnz}.*found {made.spec.nnz - 1}"):
        decode_unit(unit, {"w0": zeroed}, HostBuffer(4 * unit.decoded_nbytes).array)
