"""Machines that are not at hand, and models that are not packed."""

from dataclasses import replace

import pytest

from endor.errors import ConfigError
from endor.planning.catalogue import MACHINES, described
from endor.planning.plan import Workload, plan_costs
from endor.planning.shape import ModelShape
from endor.planning.sketch import Matrix, method, sketch_costs

SHAPE = ModelShape(8, 1024, 8, 4096, 1 << 20, 1 << 24, 1 << 16, 1000, itemsize=2)
LAYERS = [Matrix(f"layers.{at}.weight", 1 << 24) for at in range(40)]


@pytest.mark.parametrize("name", list(MACHINES))
@pytest.mark.parametrize("way", [method(), method(sparsity=0.5), method(bits=3.5)])
def test_every_machine_gets_a_plan_within_its_memory(name, way):
    target = described(name)
    machine = target.machine()
    costs = sketch_costs(LAYERS, way, machine, expert_use=1.0)
    found = plan_costs(
        costs,
        SHAPE,
        machine,
        target.disk,
        ram_bytes=target.ram_bytes,
        vram_bytes=target.vram_bytes,
        workload=Workload(context=256),
    )
    assert found.decode.seconds > 0
    assert set(found.tiers) == {matrix.name for matrix in LAYERS}
    inside = {"vram": "packed_bytes", "vram-dense": "dense_bytes"}
    held = sum(
        getattr(cost, inside[found.tiers[cost.name]])
        for cost in costs
        if found.tiers[cost.name] in inside
    )
    assert held <= target.vram_bytes < target.vram_gib * 2**30


def test_fewer_bytes_are_never_slower_where_the_link_is_the_limit():
    target = described("rtx3060-12g")
    machine = target.machine()
    seconds = []
    for way in (method(), method(sparsity=0.5), method(sparsity=0.7), method(bits=3.0)):
        costs = sketch_costs(LAYERS, way, machine, expert_use=1.0)
        found = plan_costs(
            costs,
            SHAPE,
            machine,
            target.disk,
            ram_bytes=target.ram_bytes,
            vram_bytes=330 << 20,
            workload=Workload(context=256),
        )
        seconds.append(found.decode.seconds)
    assert found.count("resident")
    assert seconds == sorted(seconds, reverse=True)


def test_a_machine_can_be_changed_and_an_unknown_one_is_named():
    assert replace(described("rtx4090"), ram_gib=128).ram_bytes == int(128 * 0.9 * 2**30)
    assert replace(described("rtx4090"), disk_gbps=14.0).disk.read_gbps == 14.0
    with pytest.raises(ConfigError, match=r"rtx1: .*rtx4090"):
        described("rtx1")


def test_sizes_of_ways_to_pack():
    assert method(sparsity=0.5).bits == pytest.approx(6.06, abs=0.01)
    assert method(bits=3.5).bits == 3.5
    assert method(sparsity=0.7).bits < method(sparsity=0.5).bits < method().bits
    for wrong in ({"sparsity": 0.5, "bits": 3.0}, {"sparsity": 50}, {"bits": 12}, {"sparsity": 0}):
        with pytest.raises(ConfigError):
            method(**wrong)
