"""Experts change places where host memory holds all of them and a copy pays."""

from dataclasses import replace

import pytest

from endor.planning.exchanges import STEP_SHARE
from endor.planning.plan import plan
from endor.planning.tiers import PACKED_IN_RAM

from .test_plan import DISK, GPU, MB, SHAPE, SMALL, make_units, packed, reserved

FAST = replace(SMALL, product="direct")
MIXTURE = replace(SHAPE, expert_use=0.25)


def planned(*, workload=FAST, vram_share=0.5, ram=10**12, machine=GPU, experts=20):
    units = make_units(28, experts=experts)
    vram = reserved(units, workload, machine) + int(vram_share * packed(units)) + 60 * MB
    found = plan(units, MIXTURE, machine, DISK, ram_bytes=ram, vram_bytes=vram, workload=workload)
    return units, found


def test_experts_in_vram_change_places_with_those_in_memory():
    units, found = planned()
    placement = found.placement
    pool, begin = placement.pool(units), placement.moving(units)
    assert 0 < len(begin) < len(pool) <= 20
    link = GPU.link.h2d_gbps * 1e9
    assert placement.exchanges.step_bytes == int(STEP_SHARE * found.decode.seconds * link)
    kept = sum(i.nbytes for i in found.reservations if i.what == "experts that begin in VRAM")
    assert kept == sum(unit.nbytes for unit in begin)
    if "host" in found.tiers.values():  # they keep the host's limit of rows wherever they are
        assert {unit.name for unit in begin} <= set(found.products.packed_rows)


def test_what_is_copied_for_its_use_saves_its_copy():
    _, found = planned(workload=SMALL)
    assert found.way == "stream"
    assert found.placement.exchanges.gain == pytest.approx(1.0)


def test_a_fast_host_leaves_experts_where_they_are():
    rates = dict.fromkeys(GPU.product_gbps, 1e5)
    fast = replace(GPU, product_gbps=rates, small_product_gbps={}, read_gbps=1e6)
    _, found = planned(machine=fast, workload=replace(FAST, host_compute="on"))
    assert found.placement.exchanges is None


@pytest.mark.parametrize("options", [{"experts": 0}, {"vram_share": 8.0}])
def test_nothing_changes_places_where_there_is_no_choice(options):
    units, found = planned(**options)
    assert found.placement.exchanges is None
    assert found.placement.pool(units) == []


def test_memory_for_the_copies_is_asked_for_first():
    """One byte less than what all experts take in host memory, and they stay where they begin."""
    units, found = planned()
    placement = found.placement
    held = sum(unit.nbytes for unit in units if placement.tiers[unit.name] in PACKED_IN_RAM)
    held += sum(item.nbytes for item in found.reservations if item.where == "ram")
    _, exactly = planned(ram=held)
    assert exactly.placement.exchanges is not None
    _, less = planned(ram=held - 1)
    assert less.placement.exchanges is None
    assert less.tiers == found.tiers
