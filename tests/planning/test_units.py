"""Records become units in file order, with what is known about their use."""

from dataclasses import replace

import pytest

from endor.codecs import dtype
from endor.errors import CheckpointError
from endor.planning import Part, WeightSpec, collect_units
from endor.planning.units import stored_dtype

from ..support.packed_files import make_packed


@pytest.fixture
def packed(tmp_path):
    return make_packed(tmp_path / "a.safetensors", [(64, 64), (64, 96), (32, 64)], routed=[1])


def test_units_follow_the_file(packed):
    units = collect_units([packed.layout], reversed(packed.specs))
    assert [unit.name for unit in units] == ["w0", "w1", "w2"]
    assert [unit.index for unit in units] == [0, 1, 2]
    assert [unit.dense_nbytes for unit in units] == [8192, 12288, 4096]
    assert all(unit.nbytes == packed.layout.records[unit.name].nbytes for unit in units)


def test_routed_units_are_in_no_order_but_kept(packed):
    assert [(unit.scheduled, unit.shared) for unit in packed.units] == [
        (True, False),
        (False, True),
        (True, False),
    ]


def test_a_record_that_two_weights_use_is_kept(packed):
    twin = replace(packed.specs[0], name="twin")
    units = collect_units([packed.layout], [*packed.specs, twin])
    assert (units[0].scheduled, units[0].shared) == (True, True)


def test_a_weight_without_its_tensor(packed):
    lost = WeightSpec("x", (4, 4), (Part("nowhere", 0, 16, 0),), "x")
    with pytest.raises(CheckpointError, match="nowhere"):
        collect_units([packed.layout], [lost])


def test_parts_share_one_dtype(packed, tmp_path):
    assert stored_dtype([packed.layout], packed.specs[0]) == dtype("BF16")
    other = make_packed(tmp_path / "b.safetensors", [(64, 64)] * 4, dtype="F32").layout
    both = WeightSpec("x", (128, 64), (Part("w0", 0, 4096, 0), Part("w3", 0, 4096, 4096)), "x")
    with pytest.raises(CheckpointError, match=r"one dtype.*BF16.*F32"):
        stored_dtype([packed.layout, other], both)
