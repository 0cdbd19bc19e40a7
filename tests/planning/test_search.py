"""The search is never worse than the single ways, keeps its budgets, and is quick."""

from dataclasses import replace

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from endor.errors import BudgetError, ConfigError
from endor.planning.catalogue import MACHINES
from endor.planning.cost import Step, kinds_of, predict
from endor.planning.device_rates import MOST_ROWS, modelled, product_s
from endor.planning.plan import Workload, plan_costs
from endor.planning.search import BEST, search
from endor.planning.shape import ModelShape
from endor.planning.sketch import Matrix, method, sketch_costs

GB = 10**9
SHAPE = ModelShape(
    layers=8,
    hidden=4096,
    heads=32,
    kv_bytes_per_token=2 * 8 * 1024 * 2,
    head_bytes=GB // 10,
    other_bytes=GB // 5,
    activation_bytes_per_token=200_000,
    vocab=32_000,
    expert_use=0.25,
    itemsize=2,
)
TARGET = MACHINES["rtx4090"]
SPARSE = method(sparsity=0.5)


def model(experts=0, machine=None, how=SPARSE):
    """Return the costs of eight layers, with or without experts."""
    matrices = []
    for layer in range(8):
        matrices += [Matrix(f"{layer}.{at}", 4096 * 4096) for at in range(4)]
        matrices += [Matrix(f"{layer}.e{at}", 4096 * 4096, routed=True) for at in range(experts)]
    machine = machine or TARGET.machine()
    return sketch_costs(matrices, how, machine, expert_use=SHAPE.expert_use)


def found(costs, *, machine=None, disk=TARGET.disk, goal="latency", shape=SHAPE, **options):
    budgets = {"ram_bytes": options.pop("ram", 2 * GB), "vram_bytes": options.pop("vram", GB)}
    most = options.pop("most", 16)
    workload = Workload(**({"prompt": 16, "context": 256, "kv": "auto"} | options))
    return search(
        costs,
        shape,
        machine or TARGET.machine(),
        disk,
        workload=workload,
        goal=goal,
        most_sequences=most,
        **budgets,
    )


def used(plan, costs):
    """Return (RAM, VRAM) that a plan takes."""
    taken = {"ram": 0, "vram": 0}
    for item in plan.reservations:
        taken[item.where] += item.nbytes
    where = {"vram": "vram", "vram-dense": "vram", "resident": "ram", "host": "ram", "dense": "ram"}
    for cost in costs:
        tier = plan.tiers[cost.name]
        if tier != "disk":
            dense = tier in ("dense", "vram-dense")
            taken[where[tier]] += cost.dense_bytes if dense else cost.packed_bytes
    return taken["ram"], taken["vram"]


budgets = st.tuples(st.integers(600, 4000), st.integers(700, 3000)).map(
    lambda pair: {"ram": pair[0] * 10**6, "vram": pair[1] * 10**6}
)


@example({"ram": 600_000_000, "vram": 1_184_000_000}, "direct", 0)  # few shares hide batch 16
@given(budgets, st.sampled_from(["exact", "direct"]), st.sampled_from([0, 4]))
@settings(max_examples=25, deadline=None)
def test_throughput_is_at_least_that_of_any_batch_and_place_and_keeps_the_budgets(
    memory, product, experts
):
    costs = model(experts)
    best = found(costs, goal="throughput", product=product, **memory)
    assert best.alternatives[0].batch == best.workload.batch
    ram, vram = used(best, costs)
    assert ram <= memory["ram"]
    assert vram <= memory["vram"]
    for batch in (1, 4, 16):
        for kv in ("device", "ram", "disk"):
            try:
                one = plan_costs(
                    costs,
                    SHAPE,
                    TARGET.machine(),
                    TARGET.disk,
                    ram_bytes=memory["ram"],
                    vram_bytes=memory["vram"],
                    workload=Workload(batch, 16, 256, product, kv),
                )
            except BudgetError:
                continue
            # a rough search compares batches: what is within its step is as good
            assert best.decode_tokens_per_s >= 0.9 * one.decode_tokens_per_s


@given(budgets, st.sampled_from(["exact", "direct"]), st.sampled_from([0, 4]))
@settings(max_examples=25, deadline=None)
def test_latency_is_what_generate_runs_by(memory, product, experts):
    costs = model(experts)
    best = found(costs, product=product, **memory)
    plain = plan_costs(
        costs,
        SHAPE,
        TARGET.machine(),
        TARGET.disk,
        ram_bytes=memory["ram"],
        vram_bytes=memory["vram"],
        workload=Workload(1, 16, 256, product, "auto"),
    )
    assert best.placement == plain.placement
    assert best.decode == plain.decode
    assert 1 <= len(best.alternatives) <= BEST
    rates = [each.decode_tokens_per_s for each in best.alternatives[1:]]
    assert rates == sorted(rates, reverse=True)
    assert {each.batch for each in best.alternatives} == {1}


@given(st.integers(700, 2500), st.integers(50, 1500), st.sampled_from(["exact", "direct"]))
@settings(max_examples=25, deadline=None)
def test_more_memory_is_never_slower(vram, more, product):
    costs = model()
    small = found(costs, goal="throughput", product=product, vram=vram * 10**6)
    large = found(costs, goal="throughput", product=product, vram=(vram + more) * 10**6)
    assert large.decode_tokens_per_s >= 0.97 * small.decode_tokens_per_s


def test_what_no_budget_holds_is_refused_and_goals_are_checked():
    with pytest.raises(BudgetError, match="the vram budget must be at least"):
        found(model(), goal="throughput", vram=10**8)
    with pytest.raises(ConfigError, match="goal must be one of latency, throughput"):
        found(model(), goal="speed")


def test_more_sequences_pay_while_weights_are_streamed():
    memory = {"vram": 650 * 10**6}
    best, one = found(model(), goal="throughput", **memory), found(model(), **memory)
    assert one.decode.bound == "link"
    assert best.workload.batch == 16
    assert best.decode_tokens_per_s > 4 * one.decode_tokens_per_s
    assert found(model(), goal="throughput", most=4, **memory).workload.batch == 4


def test_without_a_device_keys_and_values_are_in_memory_or_on_disk():
    machine = replace(TARGET.machine(), link=None)
    best = found(model(machine=machine), machine=machine, vram=0, goal="throughput")
    assert {each.kv for each in best.alternatives} <= {"device", "disk"}


def test_keys_and_values_outside_the_device_cross_the_link_or_are_read():
    costs, machine, disk = model(), TARGET.machine(), TARGET.disk
    tiers = {cost.name: "vram" for cost in costs}
    steps = {
        kv: predict(costs, tiers, machine, disk, SHAPE, Step(8, 1, 4096, kv=kv)).resources
        for kv in ("device", "ram", "disk")
    }
    nbytes = SHAPE.kv_bytes_per_token * 4096 * 8
    assert steps["device"]["link"] == steps["device"]["disk"] == 0
    assert steps["ram"]["link"] == pytest.approx(nbytes / machine.link.h2d_gbps / 1e9)
    assert steps["ram"]["disk"] == 0
    assert steps["disk"]["link"] == steps["ram"]["link"]
    assert steps["disk"]["disk"] == pytest.approx(nbytes / disk.read_gbps / 1e9)


def test_experts_in_memory_may_all_be_multiplied_there():
    best = found(model(8), product="direct", ram=8 * GB, vram=700 * 10**6)
    ways = {each.way: each for each in best.alternatives}
    if "experts" in ways:
        tiers = ways["experts"].placement.tiers
        assert all(tiers[name] != "resident" for name in tiers if ".e" in name)
    slow = replace(TARGET.machine(), link=replace(TARGET.machine().link, h2d_gbps=1.0))
    best = found(model(8, slow), machine=slow, product="direct", ram=8 * GB, vram=700 * 10**6)
    assert best.way in ("host", "both", "experts")


def test_a_device_multiplies_from_the_packed_form_where_its_rate_is_known():
    machine = TARGET.machine()
    rates = modelled(machine.link.name)["exp+bitmap"]
    unknown = replace(machine, link=replace(machine.link, name="another"))
    results = {}
    for name, each in (("known", machine), ("unknown", unknown)):
        costs = model(machine=each)
        tiers = {cost.name: "vram" for cost in costs}
        for product in ("exact", "direct"):
            step = Step(1, 1, 16, product)
            results[name, product] = predict(costs, tiers, each, TARGET.disk, SHAPE, step)
    assert results["known", "exact"] == results["unknown", "exact"]
    assert results["unknown", "direct"].seconds == results["unknown", "exact"].seconds
    fast = results["known", "direct"]
    assert fast.parts["expand"] == 0
    weights = 32 * 4096 * 4096
    assert fast.parts["multiply"] == pytest.approx(weights / rates[0] / 1e9)
    wide = Step(1, MOST_ROWS + 1, 16, "direct")
    costs = model()
    assert predict(costs, tiers, machine, TARGET.disk, SHAPE, wide).parts["expand"] > 0


@pytest.mark.parametrize("name", [*(each.device for each in MACHINES.values()), "NVIDIA H200"])
def test_the_model_knows_every_card_of_the_table(name):
    for one, most in modelled(name).values():
        assert one >= most > 0
        assert product_s(1e9, (one, most), 1) == pytest.approx(1 / one)
        assert product_s(1e9, (one, most), MOST_ROWS) == pytest.approx(1 / most)
    assert modelled(name)


def test_a_laptop_is_no_desktop_card():
    assert not modelled("NVIDIA GeForce RTX 4090 Laptop GPU")
    assert modelled("NVIDIA GeForce RTX 4090") == modelled("RTX 4090")


def test_units_that_are_alike_are_counted_and_the_sum_is_the_same():
    costs, machine = model(4), TARGET.machine()
    distinct = list(range(len(costs)))
    names = [cost.name for cost in costs]
    tiers = {name: ("disk", "resident", "vram", "host")[at % 4] for at, name in enumerate(names)}
    shares = {name: at % 3 / 2 for at, name in enumerate(names)}
    step = Step(2, 1, 64, "direct")
    made = [
        predict(costs, tiers, machine, TARGET.disk, SHAPE, step, host_shares=shares, kinds=kinds)
        for kinds in (kinds_of(costs), distinct, None)
    ]
    assert len(set(kinds_of(costs))) == 2
    for other in made[1:]:
        assert other.resources == pytest.approx(made[0].resources)
        assert other.parts == pytest.approx(made[0].parts)
