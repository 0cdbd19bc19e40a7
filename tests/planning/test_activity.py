"""Memory goes to busy neurons: within the budget, most tokens a byte first, as predicted."""

import itertools
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from endor.checkpoint.neuron_counts import NeuronCounts
from endor.codecs import DTYPES, TensorSpec, bundled
from endor.codecs.bundles import Bundles
from endor.errors import BudgetError
from endor.planning.activity import GROUPS, Activity
from endor.planning.constants import Disk
from endor.planning.cost import Step, joined, predict
from endor.planning.keeping import keeping, portions_of
from endor.planning.plan import Workload, fixed_bytes, plan
from endor.planning.unit_cost import unit_costs

from .test_plan import CPU, GPU, MB, SHAPE, make_units, ram_used, reserved

TOKENS = 10_000
FAST = Disk(
    read_gbps=2.0,
    slowest_gbps=1.5,
    fastest_gbps=2.5,
    cpu_s_per_gb=0.05,
    direct=True,
    request_us=2,
    scattered_gbps=2.0,
)
SLOW_LINK = replace(GPU, link=replace(GPU.link, h2d_gbps=6.0))
DIRECT = Workload(batch=1, prompt=16, context=64, product="direct")
SPEC = TensorSpec((16384, 4096), DTYPES["BF16"], "exp", False, nnz=4096 * 16384, k=3).turned()


def power_law(neurons: int, seed: int, mean: float = 0.06) -> np.ndarray:
    """Return counts as PowerInfer reports them: about a quarter makes 80 %."""
    rng = np.random.default_rng(seed)
    rank = rng.permutation(neurons) + 1.0
    chances = rank**-0.75
    return np.minimum(TOKENS, TOKENS * mean * chances / chances.mean()).astype(np.uint32)


def by_neuron(count: int = 6):
    """Return units of plain matrices and of ones stored by neuron, in turns, and their counts."""
    units = make_units(2 * count, 4096, 4096, codec="exp")
    active = {}
    for at, unit in enumerate(units[1::2]):
        spec = unit.layout.tensors[unit.name].spec
        spec = replace(spec, bitmap=False, nnz=spec.numel).turned()
        layout = SimpleNamespace(tensors={unit.name: SimpleNamespace(spec=spec)})
        record = replace(unit.record, nbytes=-(-spec.nbytes // 4096) * 4096)
        units[2 * at + 1] = replace(unit, layout=layout, record=record)
        active[unit.name] = power_law(4096, at)
    return units, NeuronCounts(TOKENS, active)


def activity(counts: np.ndarray | None = None) -> Activity:
    return Activity.of(SPEC, power_law(16384, 1) if counts is None else counts, TOKENS)


def test_a_neuron_lies_in_a_run_of_each_array() -> None:
    found = activity()
    assert sorted(found.runs) == [512.0, 512.0, 512.0, 4096.0]
    assert sum(found.runs) * found.neurons == pytest.approx(SPEC.nbytes, rel=0.01)
    assert len(found.shares) == GROUPS
    assert list(found.shares) == sorted(found.shares, reverse=True)


@settings(max_examples=40)
@given(share=st.floats(0, 1), more=st.floats(0, 1), rows=st.integers(1, 8))
def test_what_is_kept_is_not_read(share: float, more: float, rows: int) -> None:
    found = activity()
    share, more = min(share, more), max(share, more)
    assert 0 <= found.active(rows, more) <= found.active(rows, share) <= found.active(rows) <= 1
    assert found.active(rows, 1.0) == 0
    assert found.active(1, share) <= found.active(rows, share) + 1e-12
    assert found.blocks(share) <= found.blocks(more) + 1e-12
    assert share - 1e-9 <= found.blocks(share) + 1e-9  # blocks are shared by others
    assert found.blocks(found.kept(share)) <= share + 1e-5
    assert (found.blocks(0.0), found.kept(1.0)) == (0.0, 1.0)


def test_active_shares_are_those_counted() -> None:
    counts = power_law(16384, 3)
    found = activity(counts)
    assert found.active() == pytest.approx(counts.mean() / TOKENS, rel=1e-6)
    hottest = np.sort(counts)[: 16384 * 3 // 4]
    assert found.active(1, 0.25) == pytest.approx(hottest.sum() / 16384 / TOKENS, rel=1e-6)


def test_dear_requests_read_the_whole() -> None:
    found = activity()
    whole = SPEC.nbytes
    nbytes, seconds = found.reads(whole, FAST, 1, 0.0)
    assert nbytes < 0.4 * whole
    assert seconds > nbytes / 2e9
    assert found.reads(whole, replace(FAST, request_us=500.0), 1, 0.0) == (whole, whole / 2e9)
    less, _ = found.reads(whole, FAST, 1, 0.3)
    assert less < 0.7 * nbytes
    assert found.reads(whole, FAST, 1, 1.0) == (0.0, 0.0)


@settings(max_examples=25, deadline=None)
@given(budget=st.integers(140, 520), count=st.integers(1, 6))
def test_the_budget_holds(budget: int, count: int) -> None:
    units, counts = by_neuron(count)
    ram = reserved(units, DIRECT) + budget * MB
    found = plan(units, SHAPE, CPU, FAST, ram_bytes=ram, workload=DIRECT, counts=counts)
    assert ram_used(found, units) <= ram
    for name, nbytes in found.kept_bytes.items():
        assert found.tiers[name] == "disk"
        assert name in counts.active
        assert 0 < nbytes < units[1].nbytes
        assert nbytes % 4096 == 0


def test_counts_make_a_plan_faster() -> None:
    units, counts = by_neuron(16)
    plain = sum(unit.nbytes for unit in units[::2])
    turned = sum(unit.nbytes for unit in units[1::2])
    ram = reserved(units, DIRECT) + 4 * units[1].nbytes + plain + turned // 4
    made = {
        known: plan(
            units,
            SHAPE,
            CPU,
            FAST,
            ram_bytes=ram,
            workload=DIRECT,
            counts=counts if known else None,
        )
        for known in (False, True)
    }
    assert not made[False].kept_bytes
    assert len(made[True].kept_bytes) == 16
    costs = unit_costs(units, CPU, SHAPE, counts)
    step = Step(1, 1, DIRECT.context, "direct")
    without = predict(costs, made[False].tiers, CPU, FAST, SHAPE, step)
    assert made[True].decode.disk_bytes < 0.8 * without.disk_bytes
    assert made[True].decode.seconds < 0.9 * without.seconds
    assert made[True].placement.kept_bytes == made[True].kept_bytes
    exact = replace(DIRECT, product="exact")
    assert not plan(
        units, SHAPE, CPU, FAST, ram_bytes=ram, workload=exact, counts=counts
    ).kept_bytes


def test_busier_matrices_get_more() -> None:
    units, counts = by_neuron(6)
    names = sorted(counts.active)
    busy = np.minimum(TOKENS, 4 * counts.active[names[0]])
    counts = replace(counts, active={**counts.active, names[0]: busy})
    costs = unit_costs(units, CPU, SHAPE, counts)
    ram = 8 * units[1].nbytes
    kept = keeping(costs, {}, ram, 0.0, FAST, 1)
    assert kept is not None
    share = {
        name: units[1].nbytes if kept.tiers[name] == "resident" else kept.kept_bytes.get(name, 0)
        for name in names
    }
    assert share[names[0]] > share[names[1]]
    wished = keeping(costs, {names[0]: "disk"}, ram, 0.0, FAST, 1)
    assert wished is None or names[0] not in wished.kept_bytes
    assert keeping(unit_costs(units, CPU, SHAPE), {}, ram, 0.0, FAST, 1) is None
    assert keeping(costs, {}, 10**12, 0.0, FAST, 1) is None


def test_dear_requests_are_worth_more_than_streamed_units() -> None:
    """What a byte saves: more where each neuron that is not there costs a request."""
    units, counts = by_neuron(1)
    (cost,) = (c for c in unit_costs(units, CPU, SHAPE, counts) if c.activity)
    one = replace(cost, activity=replace(cost.activity, runs=(5632.0,)))
    found = {us: list(portions_of(one, replace(FAST, request_us=us), 1)) for us in (0.1, 2.0, 20.0)}
    for us, portions in found.items():
        worth = [each.worth for each in portions]
        assert worth == sorted(worth, reverse=True)
        assert all(a.stop == b.start for a, b in itertools.pairwise(portions))
        saved = sum(each.worth * (each.stop - each.start) for each in portions)
        first = one.activity.reads(one.packed_bytes, replace(FAST, request_us=us), 1, 0.0)[1]
        assert saved == pytest.approx(first, rel=1e-6)
    assert found[0.1][0].worth < found[2.0][0].worth < found[20.0][0].worth
    assert found[20.0][0].worth * 2e9 > 1


def on_device(counts: NeuronCounts | None, units, vram: int, ram: int, **changes):
    workload = replace(DIRECT, **changes)
    return plan(
        units,
        SHAPE,
        SLOW_LINK,
        FAST,
        ram_bytes=ram,
        vram_bytes=vram,
        workload=workload,
        counts=counts,
    )


@settings(max_examples=15, deadline=None)
@given(vram=st.integers(100, 700), ram=st.integers(60, 900))
def test_budgets_hold_beside_a_device(vram: int, ram: int) -> None:
    units, counts = by_neuron(6)
    costs = unit_costs(units, SLOW_LINK, SHAPE, counts)
    fixed = sum(fixed_bytes(SHAPE, costs, DIRECT, on_device=True).values())
    try:
        found = on_device(counts, units, fixed + vram * MB, ram * MB)
    except BudgetError:
        return
    in_vram = sum(found.kept_bytes.values())
    in_vram += sum(unit.nbytes for unit in units if found.tiers[unit.name] == "vram")
    in_vram += sum(unit.dense_nbytes for unit in units if found.tiers[unit.name] == "vram-dense")
    passing = [unit.nbytes for unit in units if found.tiers[unit.name] != "vram"]
    in_vram += found.slots * max(passing, default=0)
    assert in_vram <= vram * MB
    in_ram = sum(unit.nbytes for unit in units if found.tiers[unit.name] in ("resident", "host"))
    assert in_ram + found.staging_bytes <= ram * MB
    for name in found.kept_bytes:
        assert found.tiers[name] == "host"
        assert found.host_shares.get(name, 1.0) == 1.0
    found.placement.check(units, on_device=True)


def test_busy_neurons_come_to_the_device() -> None:
    """Where the link is slow: faster than whole units there, and than none of them."""
    units, counts = by_neuron(12)
    costs = unit_costs(units, SLOW_LINK, SHAPE, counts)
    fixed = sum(fixed_bytes(SHAPE, costs, DIRECT, on_device=True).values())
    plain = sum(unit.nbytes for unit in units[::2])
    vram = fixed + plain + 5 * units[1].nbytes
    known, unknown = (on_device(each, units, vram, 2000 * MB) for each in (counts, None))
    assert not unknown.kept_bytes
    assert len(known.kept_bytes) > 6
    step = Step(1, 1, DIRECT.context, "direct")
    without = predict(
        costs, unknown.tiers, SLOW_LINK, FAST, SHAPE, step, host_shares=unknown.host_shares
    )
    assert known.decode.seconds < 0.9 * without.seconds
    off = on_device(counts, units, vram, 2000 * MB, host_compute="off")
    assert not off.kept_bytes
    assert not on_device(counts, units, vram, 2000 * MB, product="exact").kept_bytes
    assert any(item.what == "busy neurons" and item.where == "vram" for item in known.reservations)


def test_bundles_are_read_not_kept() -> None:
    """What stays in memory of a matrix to read parts of it: offsets and sums, not its bundles."""
    rng = np.random.default_rng(0)
    bits = (rng.standard_normal((300, 2048)).astype(np.float32).view(np.uint32) >> 16).astype("<u2")
    form = TensorSpec((300, 2048), DTYPES["BF16"], "exp", False, nnz=bits.size, k=3, base=120)
    made = bundled.encode(bits, form, 1)
    (unit, *_) = make_units(1)
    layout = SimpleNamespace(tensors={unit.name: SimpleNamespace(spec=made.spec)})
    (cost,) = unit_costs([replace(unit, layout=layout)], CPU, SHAPE)
    assert 0 < cost.neuron_bytes < 0.02 * made.spec.nbytes
    (run,) = Activity.of(made.spec, np.ones(300, np.uint32), TOKENS).runs
    assert run * 300 == pytest.approx(made.spec.nbytes, rel=0.01)


def test_without_counts_reads_are_told_from_the_price_of_a_request() -> None:
    units, _ = by_neuron(1)
    (one,) = (cost for cost in unit_costs(units, CPU, SHAPE) if cost.by_neuron)
    assert one.activity is None
    assert one.assumed is not None
    cheap, dear = (
        one.assumed.reads(one.packed_bytes, replace(FAST, request_us=us), 1, 0.0)
        for us in (0.1, 500.0)
    )
    assert cheap[0] < one.packed_bytes == dear[0]
    found = [
        predict(unit_costs(units, CPU, SHAPE), tiers, CPU, disk, SHAPE, Step(1, 1, 16, "direct"))
        for tiers in [{unit.name: "disk" for unit in units}]
        for disk in (replace(FAST, request_us=0.1), replace(FAST, request_us=500.0))
    ]
    assert found[0].disk_bytes < found[1].disk_bytes


def test_a_bundle_is_one_run() -> None:
    units, _ = by_neuron(1)
    spec = units[1].layout.tensors[units[1].name].spec
    together = replace(spec, bundles=Bundles(1, -(-spec.nbytes // 8) * 8))
    scattered, joined = (Activity.alike(one, 0.1) for one in (spec, together))
    assert len(scattered.runs) > len(joined.runs) == 1
    whole, disk = spec.nbytes, replace(FAST, request_us=0.5)
    assert joined.reads(whole, disk, 1, 0.0)[1] < scattered.reads(whole, disk, 1, 0.0)[1]


def test_nothing_hides_reads_of_parts() -> None:
    units, counts = by_neuron()
    costs = unit_costs(units, CPU, SHAPE, counts)
    tiers = dict.fromkeys((cost.name for cost in costs), "disk")
    step = Step(1, 1, 64, "direct")
    found = predict(costs, tiers, CPU, FAST, SHAPE, step)
    plain = [cost for cost in costs if not cost.by_neuron]
    parts = [
        cost.activity.reads(cost.packed_bytes, FAST, 1, 0.0) for cost in costs if cost.activity
    ]
    assert all(nbytes < costs[1].packed_bytes for nbytes, _ in parts)
    assert found.unhidden == pytest.approx(sum(seconds for _, seconds in parts))
    ahead = sum(cost.packed_bytes for cost in plain)
    assert found.resources["disk"] == pytest.approx(ahead / FAST.read_gbps / 1e9)
    assert found.disk_bytes == pytest.approx(ahead + sum(nbytes for nbytes, _ in parts))
    assert found.seconds == pytest.approx(joined(found.resources.values()) + found.unhidden)
