"""The planner keeps its budgets, spreads tiers through depth, and predicts from its constants."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from endor.codecs import DTYPES, TensorSpec
from endor.errors import BudgetError, ConfigError
from endor.planning.constants import Disk, Link, Machine
from endor.planning.cost import Step, joined, predict
from endor.planning.plan import Workload, fixed_bytes, plan
from endor.planning.shape import ModelShape
from endor.planning.unit_cost import unit_costs
from endor.planning.units import Unit
from endor.sizes import size
from endor.storage.layout import Record

MB = 10**6
KINDS = ("raw+bitmap", "exp+bitmap", "exp", "int")
CPU = Machine(
    dtype="BF16",
    threads=2,
    copy_gbps=20.0,
    read_gbps=40.0,
    expand_gbps=dict.fromkeys(KINDS, 30.0),
    product_gbps=dict.fromkeys(KINDS, 25.0),
    linear_gbps=10.0,
    gemm_gflops=200.0,
    op_us=2.0,
)
GPU = replace(
    CPU,
    link=Link(
        name="card",
        vram_bytes=24 * 10**9,
        h2d_gbps=25.0,
        copy_us=8.0,
        hbm_gbps=800.0,
        launch_us=5.0,
        gemm_gflops=150e3,
    ),
)
DISK = Disk(read_gbps=2.0, slowest_gbps=1.5, fastest_gbps=2.5, cpu_s_per_gb=0.05, direct=True)
SHAPE = ModelShape(
    layers=4,
    hidden=4096,
    heads=32,
    kv_bytes_per_token=2 * 4 * 4096 * 2,
    head_bytes=30 * MB,
    other_bytes=60 * MB,
    activation_bytes_per_token=100_000,
    vocab=4096,
)
SMALL = Workload(batch=1, prompt=16, context=64)


def make_units(count=28, rows=4096, cols=4096, *, experts=0, codec="exp", nnz_share=0.5):
    """Return units of one matrix each, the last `experts` of them routed."""
    numel = rows * cols
    spec = TensorSpec(
        (rows, cols),
        DTYPES["BF16"],
        codec,
        bitmap=codec != "dense",
        nnz=numel if codec == "dense" else int(numel * nnz_share),
        k=3 if codec == "exp" else 0,
    )
    packed = -(-spec.nbytes // 4096) * 4096
    units = []
    for index in range(count):
        name = f"layers.{index}"
        layout = SimpleNamespace(tensors={name: SimpleNamespace(spec=spec)})
        units.append(
            Unit(
                index=index,
                name=name,
                record=Record(name, Path("x"), index * packed, packed, "", (name,), ()),
                layout=layout,
                tensors=(name,),
                dense_nbytes=spec.dense_nbytes,
                scheduled=index < count - experts,
                shared=index >= count - experts,
            )
        )
    return units


def reserved(units, workload=SMALL, machine=CPU):
    costs = unit_costs(units, machine, SHAPE)
    on_device = machine.link is not None
    return sum(fixed_bytes(SHAPE, costs, workload, on_device=on_device).values())


def packed(units):
    return sum(unit.nbytes for unit in units)


def ram_used(found, units):
    """Bytes of memory that a processor's plan takes, counted from its tiers."""
    total = found.staging_bytes + sum(
        item.nbytes for item in found.reservations if "staging" not in item.what
    )
    for unit in units:
        tier = found.tiers[unit.name]
        sizes = {"dense": unit.dense_nbytes, "resident": unit.nbytes, "disk": 0}
        total += unit.decoded_nbytes if tier == "decoded" else sizes[tier]
    return total


def test_all_packed_when_that_fits_and_is_fastest():
    units = make_units()
    workload = replace(SMALL, product="direct")
    budget = reserved(units) + packed(units)
    found = plan(units, SHAPE, CPU, DISK, ram_bytes=budget, workload=workload)
    assert found.count("resident") == len(units)
    assert found.staging_bytes == 0
    assert found.decode.disk_bytes == 0
    assert found.decode.bound == "cpu"


SLOW_EXP = replace(
    CPU,
    product_gbps=CPU.product_gbps | {"exp+bitmap": 8.0},
    product_row_cost={"raw+bitmap": 0.1, "exp+bitmap": 0.2},
)


def test_entropy_codes_are_undone_where_that_is_faster_and_memory_is_left():
    units = make_units()
    workload = replace(SMALL, product="direct")
    need = reserved(units) + packed(units)
    one = units[0].decoded_nbytes - units[0].nbytes
    first = units[0]
    passing = 2 * (first.nbytes + first.dense_nbytes + first.decoded_nbytes)
    for room, count in ((passing + one - 1, 0), (passing + 5 * one, 5), (passing + 28 * one, 28)):
        found = plan(units, SHAPE, SLOW_EXP, DISK, ram_bytes=need + room, workload=workload)
        assert found.count("decoded") == count
        assert found.count("disk") == found.count("dense") == 0
        assert ram_used(found, units) <= need + room
        assert found.load_s == pytest.approx(packed(units) / DISK.read_gbps / 1e9)
    raw = make_units(codec="raw")
    theirs = plan(raw, SHAPE, SLOW_EXP, DISK, ram_bytes=2 * packed(raw), workload=workload)
    assert found.decode.seconds == pytest.approx(theirs.decode.seconds, rel=0.01)
    assert found.products.packed_rows["layers.0"] == theirs.products.packed_rows["layers.0"]


@pytest.mark.parametrize(
    ("machine", "product"), [(CPU, "direct"), (SLOW_EXP, "exact")], ids=["same rates", "exact"]
)
def test_entropy_codes_stay_where_undoing_them_gains_nothing(machine, product):
    units = make_units()
    workload = replace(SMALL, product=product)
    slow = replace(machine, product_gbps=machine.product_gbps | {"raw+bitmap": 25.0})
    if machine is CPU:  # raw moves 1.5 times the bytes, at the same rate
        assert units[0].decoded_nbytes > units[0].nbytes
    found = plan(units, SHAPE, slow, DISK, ram_bytes=10**10, workload=workload)
    assert found.count("decoded") == 0


def test_no_memory_goes_to_undone_codes_while_units_lie_on_disk():
    units = make_units()
    workload = replace(SMALL, product="direct")
    budget = reserved(units) + packed(units) * 3 // 4
    found = plan(units, SHAPE, SLOW_EXP, DISK, ram_bytes=budget, workload=workload)
    assert found.count("disk")
    assert not found.count("decoded")


def test_expanded_when_memory_allows_and_products_are_exact():
    units = make_units()
    budget = 10 * sum(unit.dense_nbytes for unit in units)
    found = plan(units, SHAPE, CPU, DISK, ram_bytes=budget, workload=SMALL)
    assert found.count("dense") == len(units)
    assert found.dense_is_faster
    assert found.decode.seconds == pytest.approx(found.dense_decode.seconds)


def test_direct_product_beats_a_dense_model_that_fits():
    units = make_units()
    found = plan(
        units,
        SHAPE,
        CPU,
        DISK,
        ram_bytes=10 * sum(unit.dense_nbytes for unit in units),
        workload=replace(SMALL, product="direct"),
    )
    assert found.count("resident") == len(units)
    assert found.dense_decode is not None
    assert not found.dense_is_faster


def test_streamed_units_lie_between_residents():
    units = make_units(40)
    budget = reserved(units) + packed(units) * 6 // 10
    found = plan(units, SHAPE, CPU, DISK, ram_bytes=budget, workload=SMALL)
    tiers = [found.tiers[unit.name] for unit in units]
    assert 10 < tiers.count("disk") < 30
    for begin in range(0, 40, 10):
        assert 2 <= tiers[begin : begin + 10].count("disk") <= 8


def test_the_disk_binds_when_everything_is_on_it():
    units = make_units()
    budget = reserved(units) + 3 * units[0].nbytes
    found = plan(units, SHAPE, CPU, DISK, ram_bytes=budget, workload=SMALL)
    assert found.count("disk") >= len(units) - 1
    assert found.decode.bound == "disk"
    read = sum(unit.nbytes for unit in units if found.tiers[unit.name] == "disk")
    assert found.decode.resources["disk"] == pytest.approx(read / 2e9)
    assert found.decode.seconds == pytest.approx(joined(found.decode.resources.values()))
    assert 2e9 / read > found.decode_tokens_per_s > 0.8 * 2e9 / read


@given(st.floats(0, 100), st.floats(0, 100), st.floats(0, 10))
def test_what_goes_on_at_once_takes_longer_than_either_and_shorter_than_in_turns(one, two, more):
    both = joined([one, two])
    assert max(one, two) <= both * (1 + 1e-9)
    assert both <= (one + two) * (1 + 1e-9)
    assert joined([one + more, two]) >= both * (1 - 1e-9)
    assert joined([one, 0.0]) == pytest.approx(one)


def test_checks_of_what_was_read_take_their_share_of_the_processor():
    units = make_units()
    costs = unit_costs(units, CPU, SHAPE)
    tiers = {unit.name: "disk" for unit in units}
    step = Step(1, 1, 64)
    without = predict(costs, tiers, CPU, DISK, SHAPE, step)
    checked = predict(costs, tiers, replace(CPU, checksum_gbps=10.0), DISK, SHAPE, step)
    assert without.parts["checks"] == 0.0
    assert checked.parts["checks"] == pytest.approx(packed(units) / 10e9 / CPU.threads)
    assert checked.seconds > without.seconds
    kept = predict(costs, dict.fromkeys(tiers, "resident"), CPU, DISK, SHAPE, step)
    assert kept.parts["checks"] == 0.0


def test_a_refusal_names_the_least_budget_and_that_budget_works():
    units = make_units()
    with pytest.raises(
        BudgetError, match=r"the ram budget must be at least .*\((\d+) bytes\)"
    ) as error:
        plan(units, SHAPE, CPU, DISK, ram_bytes=50 * MB, workload=SMALL)
    least = int(str(error.value).partition("(")[2].partition(" bytes")[0])
    plan(units, SHAPE, CPU, DISK, ram_bytes=least, workload=SMALL)
    with pytest.raises(BudgetError):
        plan(units, SHAPE, CPU, DISK, ram_bytes=least - 1, workload=SMALL)


@settings(max_examples=40, deadline=None)
@given(
    count=st.integers(1, 24),
    experts=st.integers(0, 12),
    extra=st.integers(0, 400 * MB),
    product=st.sampled_from(["exact", "direct"]),
    codec=st.sampled_from(["exp", "raw", "dense"]),
)
def test_budgets_hold_whatever_they_are(count, experts, extra, product, codec):
    units = make_units(count, 1024, 4096, experts=min(experts, count), codec=codec)
    shape = replace(SHAPE, expert_use=0.25)
    workload = replace(SMALL, product=product)
    fixed = sum(fixed_bytes(shape, unit_costs(units, CPU, shape), workload).values())
    budget = fixed + 2 * units[0].nbytes + extra
    found = plan(units, shape, CPU, DISK, ram_bytes=budget, workload=workload)
    assert set(found.tiers) == {unit.name for unit in units}
    assert ram_used(found, units) <= budget
    found.placement.check(units)


@settings(max_examples=30, deadline=None)
@given(count=st.integers(4, 24), vram=st.integers(0, 600 * MB), ram=st.integers(0, 600 * MB))
def test_device_budgets_hold(count, vram, ram):
    units = make_units(count, 1024, 4096)
    fixed = reserved(units, machine=GPU) + 3 * units[0].nbytes
    found = plan(
        units,
        SHAPE,
        GPU,
        DISK,
        ram_bytes=2 * units[0].nbytes + ram,
        vram_bytes=fixed + vram,
        workload=SMALL,
    )
    on_device = {"vram-dense": "dense_nbytes", "vram": "nbytes"}
    near = sum(
        getattr(unit, on_device[found.tiers[unit.name]])
        for unit in units
        if found.tiers[unit.name] in on_device
    )
    far = sum(unit.nbytes for unit in units if found.tiers[unit.name] == "resident")
    slots = found.slots * units[0].nbytes
    assert near + slots <= vram + 3 * units[0].nbytes
    assert slots or near == sum(unit.nbytes for unit in units)
    assert far + found.staging_bytes <= 2 * units[0].nbytes + ram
    found.placement.check(units, on_device=True)


def test_residents_stay_packed_in_vram_while_anything_is_streamed():
    units = make_units(40)
    room = packed(units) // 2
    fixed = reserved(units, machine=GPU) + 3 * units[0].nbytes
    found = plan(
        units,
        SHAPE,
        GPU,
        DISK,
        ram_bytes=2 * packed(units),
        vram_bytes=fixed + room,
        workload=SMALL,
    )
    assert found.count("vram") == 20
    assert found.count("vram-dense") == 0
    assert found.decode.bound == "link"
    assert found.count("disk") == 0


def test_what_every_step_needs_is_resident_before_experts():
    units = make_units(20, experts=10)
    shape = replace(SHAPE, expert_use=0.25)
    budget = reserved(units) + packed(units) * 8 // 10
    fast = replace(CPU, linear_gbps=1e4, expand_gbps=dict.fromkeys(KINDS, 1e4))
    found = plan(units, shape, fast, DISK, ram_bytes=budget, workload=SMALL)
    assert 0 < found.count("disk") < 10
    assert all(found.tiers[unit.name] != "disk" for unit in units if unit.scheduled)


def test_experts_cost_their_share_of_use():
    shape = replace(SHAPE, expert_use=0.25)
    units = make_units(8, experts=8)
    costs = unit_costs(units, CPU, shape)
    tiers = {unit.name: "disk" for unit in units}
    one = predict(costs, tiers, CPU, DISK, shape, Step(1, 1, 16))
    many = predict(costs, tiers, CPU, DISK, shape, Step(1, 512, 512))
    assert one.disk_bytes == pytest.approx(packed(units) / 4)
    assert many.disk_bytes == pytest.approx(packed(units))
    assert one.unhidden == pytest.approx(one.disk_bytes / 2e9)


def test_a_prompt_reads_each_unit_once():
    units = make_units()
    costs = unit_costs(units, CPU, SHAPE)
    tiers = {unit.name: "disk" for unit in units}
    decode = predict(costs, tiers, CPU, DISK, SHAPE, Step(1, 1, 64))
    prefill = predict(costs, tiers, CPU, DISK, SHAPE, Step(1, 64, 64))
    assert prefill.disk_bytes == decode.disk_bytes
    assert prefill.parts["multiply"] == pytest.approx(
        2 * 64 * sum(cost.weights for cost in costs) / 200e9
    )


def test_parts_add_up():
    units = make_units()
    costs = unit_costs(units, CPU, SHAPE)
    tiers = {unit.name: "resident" for unit in units}
    found = predict(costs, tiers, CPU, DISK, SHAPE, Step(1, 1, 64))
    assert sum(found.parts.values()) == pytest.approx(found.resources["cpu"])
    assert found.parts["expand"] == pytest.approx(sum(u.dense_nbytes for u in units) / 30e9)
    assert found.seconds == found.resources["cpu"]


def test_bad_workloads_and_missing_devices_are_refused():
    units = make_units(2)
    with pytest.raises(ConfigError, match="context must hold the prompt"):
        plan(units, SHAPE, CPU, DISK, ram_bytes=10**10, workload=Workload(1, 100, 50))
    with pytest.raises(ConfigError, match="needs a CUDA device"):
        plan(units, SHAPE, CPU, DISK, ram_bytes=10**10, vram_bytes=10**10)


def test_shape_from_config():
    config = {
        "text_config": {
            "num_hidden_layers": 2,
            "hidden_size": 64,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "intermediate_size": 128,
            "vocab_size": 100,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
        }
    }
    shape = ModelShape.from_config(config, other_bytes=5, head_packed=False)
    assert shape.kv_bytes_per_token == 2 * 2 * 2 * 16 * 2
    assert shape.head_bytes == 100 * 64 * 2
    assert shape.expert_use == 0.25
    with pytest.raises(ConfigError, match="num_hidden_layers"):
        ModelShape.from_config({}, other_bytes=0, head_packed=True)


@pytest.mark.parametrize(
    ("nbytes", "text"), [(12, "12 B"), (2048, "2.0 KiB"), (6 * 2**30, "6.00 GiB")]
)
def test_sizes_read_as_budgets_are_written(nbytes, text):
    assert size(nbytes) == text


LONG = replace(SMALL, context=20_000)
DEEP = replace(SHAPE, layers=40)


def kept_outside(workload, vram=0, ram=1 << 40, shape=DEEP):
    machine = GPU if vram else CPU
    budgets = {"ram_bytes": ram, "vram_bytes": vram}
    return plan(make_units(), shape, machine, DISK, workload=workload, **budgets)


def test_keys_and_values_go_where_the_context_fits():
    total = DEEP.kv_bytes_per_token * LONG.context
    auto = replace(LONG, kv="auto")
    assert kept_outside(auto).workload.kv == "device"
    with pytest.raises(BudgetError):
        kept_outside(LONG, ram=total)
    on_disk = kept_outside(auto, ram=total)
    assert on_disk.workload.kv == "disk"
    cache = {item.where: item.nbytes for item in on_disk.reservations if "keys" in item.what}
    assert cache == {"ram": 3 * total // DEEP.layers}


def test_beside_a_device_keys_and_values_go_to_ram_before_they_go_to_disk():
    total = DEEP.kv_bytes_per_token * LONG.context
    auto = replace(LONG, kv="auto")
    vram = fixed_bytes(DEEP, [], replace(LONG, kv="disk"), on_device=True)
    vram = sum(vram.values()) + packed(make_units())
    assert kept_outside(auto, vram=total + vram).workload.kv == "device"
    in_ram = kept_outside(auto, vram=vram)
    assert in_ram.workload.kv == "ram"
    cache = {item.where: item.nbytes for item in in_ram.reservations if "keys" in item.what}
    assert cache == {"vram": 3 * total // DEEP.layers, "ram": total}
    assert kept_outside(auto, vram=vram, ram=total // 2).workload.kv == "disk"
    with pytest.raises(BudgetError, match="ram budget must be at least"):
        kept_outside(replace(LONG, kv="ram"), vram=vram, ram=total // 2)
