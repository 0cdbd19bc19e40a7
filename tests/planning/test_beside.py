"""What the host multiplies beside a device: both ends take equally long, and wishes are kept."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from endor.errors import ConfigError
from endor.planning.beside import check_host_compute, host_products, spread
from endor.planning.catalogue import MACHINES
from endor.planning.cost import Step, predict
from endor.planning.plan import Workload, plan, plan_costs
from endor.planning.sketch import Matrix, method, sketch_costs
from endor.planning.tiers import Placement
from endor.planning.unit_cost import unit_costs

from .test_plan import CPU, DISK, GPU, MB, SHAPE, SMALL, make_units, packed, reserved

FAST = replace(SMALL, product="direct")
FREE = replace(GPU, link=replace(GPU.link, copy_us=1e-6))


def planned(machine=GPU, *, vram_share=0.3, workload=FAST, ram=10**12, **options):
    units = make_units(**options)
    vram = reserved(units, workload, machine) + int(vram_share * packed(units))
    found = plan(
        units, SHAPE, machine, DISK, ram_bytes=ram, vram_bytes=vram + 60 * MB, workload=workload
    )
    return units, found


def test_exact_products_stay_on_the_device():
    _, found = planned(workload=SMALL)
    assert found.way == "stream"
    assert found.count("host") == 0
    assert found.products.packed_rows == {}
    assert all(item.what != "activations between device and host" for item in found.reservations)


def test_off_is_off_and_on_is_on():
    _, off = planned(workload=replace(FAST, host_compute="off"))
    assert off.way == "stream"
    slow = replace(GPU, product_gbps=dict.fromkeys(CPU.product_gbps, 0.01))
    _, auto = planned(slow)
    assert auto.count("host") <= 1
    _, on = planned(slow, workload=replace(FAST, host_compute="on"))
    assert on.count("host") > 0
    assert on.way != "stream"
    assert min(on.products.packed_rows.values()) >= 1


def test_a_slow_link_gives_work_to_the_host():
    units, found = planned()
    assert found.way in ("host", "both")
    decode, ways = found.decode, {each.way: each for each in found.alternatives}
    assert set(ways) == {"stream", "host", "both"}
    assert ways["stream"].decode_tokens_per_s < 0.8 * found.decode_tokens_per_s
    assert decode.host_bytes > 0
    assert decode.host_bytes + decode.link_bytes < packed(units)
    assert {"host products", "round trips"} <= decode.parts.keys()
    assert found.prefill.host_bytes == 0  # many rows go to the device
    assert set(found.products.packed_rows) == {
        name for name, tier in found.tiers.items() if tier == "host"
    }


def test_the_two_roads_end_together():
    _, found = planned(FREE, count=200, vram_share=0.1)
    gpu, link = found.decode.resources["gpu"], found.decode.resources["link"]
    assert gpu == pytest.approx(link, rel=0.05)


def test_the_time_of_the_example_is_the_bound():
    """70 billion weights at half, 24 GB of VRAM, x16: both rates add up, or the memory's counts."""
    target = MACHINES["rtx4090"]
    machine = replace(target.machine(), read_gbps=1e6)
    machine = replace(machine, product_gbps=dict.fromkeys(machine.product_gbps, 48.0))
    matrices = [Matrix(f"m{at}", 125 * 10**6) for at in range(560)]
    costs = sketch_costs(matrices, method(sparsity=0.5), machine, expert_use=1.0)
    shape = replace(SHAPE, layers=80, hidden=8192, head_bytes=0)
    found = plan_costs(
        costs,
        shape,
        machine,
        target.disk,
        ram_bytes=10**12,
        vram_bytes=target.vram_bytes,
        workload=FAST,
    )
    outside = sum(c.packed_bytes for c in costs if not found.tiers[c.name].startswith("vram"))
    bound = outside / (48e9 + 24e9)
    others = sum(
        seconds
        for what, seconds in found.decode.parts.items()
        if what not in ("host products", "round trips")
    )
    assert bound < found.decode.seconds < bound + others + 0.1 * bound


def test_memory_that_both_read_is_a_limit():
    narrow = replace(FREE, read_gbps=26.0)
    _, found = planned(narrow)
    assert found.decode.resources["memory"] == pytest.approx(
        (found.decode.host_bytes + found.decode.link_bytes) / 26e9
    )


def test_units_that_products_do_not_take_are_streamed():
    _, found = planned(codec="dense")
    assert found.way == "stream"


@settings(max_examples=50, deadline=None)
@given(share=st.floats(0, 1), count=st.integers(1, 60), sizes=st.randoms())
def test_spread_takes_about_the_share_through_all_of_the_depth(share, count, sizes):
    costs = [
        replace(cost, packed_bytes=sizes.randrange(1, 10**6))
        for cost in unit_costs(make_units(count), GPU, SHAPE)
    ]
    chosen = set(spread(costs, share))
    seen = taken = 0
    largest = max(cost.packed_bytes for cost in costs)
    for cost in costs:
        seen += cost.packed_bytes
        taken += cost.packed_bytes if cost.name in chosen else 0
        assert abs(taken - share * seen) <= largest
    if share == 1.0:
        assert len(chosen) == count


def test_more_rows_are_multiplied_there_while_that_is_faster():
    units = make_units(2)
    costs = unit_costs(units, GPU, SHAPE)
    tiers = {units[0].name: "host", units[1].name: "resident"}
    whole = host_products(Placement(tiers, 0, 1), costs, GPU, rows=1)
    assert whole.packed_rows == {units[0].name: 1}  # 25 GB/s either way
    part = host_products(Placement(tiers, 0, 1, {units[0].name: 0.5}), costs, GPU, rows=1)
    assert part.packed_rows[units[0].name] > 1
    wished = host_products(Placement(tiers, 0, 1), costs, GPU, rows=4)
    assert wished.packed_rows == {units[0].name: 4}


@settings(max_examples=50, deadline=None)
@given(share=st.floats(0, 1), rows=st.integers(1, 8))
def test_terms_are_linear_in_the_share(share, rows):
    units = make_units(6)
    costs = unit_costs(units, GPU, SHAPE)
    tiers = {unit.name: "host" for unit in units}
    step = Step(rows, 1, 64, "direct")

    def at(value):
        shares = dict.fromkeys(tiers, value)
        return predict(costs, tiers, GPU, DISK, SHAPE, step, host_shares=shares)

    one, some = at(1.0), at(share)
    assert some.host_bytes == pytest.approx(share * one.host_bytes)
    assert some.link_bytes == pytest.approx((1 - share) * packed(units))
    host = some.parts.get("host products", 0.0)
    assert host == pytest.approx(share * one.parts["host products"])


def test_wishes_that_cannot_be_had_are_refused():
    check_host_compute("auto", exact=True)
    check_host_compute("on", exact=False)
    with pytest.raises(ConfigError, match="exact=False"):
        check_host_compute("on", exact=True)
    with pytest.raises(ConfigError, match="auto, on or off"):
        check_host_compute("yes", exact=False)
    units = make_units(4)
    with pytest.raises(ConfigError, match="CUDA device"):
        plan(
            units,
            SHAPE,
            CPU,
            DISK,
            ram_bytes=10**12,
            workload=Workload(product="direct", host_compute="on"),
        )


def test_a_plan_names_its_best_ways_in_order():
    _, found = planned()
    first, *others = found.alternatives
    assert first.decode_tokens_per_s == pytest.approx(found.decode_tokens_per_s)
    assert first.prefill_tokens_per_s == pytest.approx(found.prefill_tokens_per_s)
    assert first.way == found.way
    assert len(others) >= 1
    rates = [each.decode_tokens_per_s for each in others]
    assert rates == sorted(rates, reverse=True)
    assert 0.99 * max(rates) <= first.decode_tokens_per_s
