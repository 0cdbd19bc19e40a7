"""Experts that change places between host memory and a simulated device, while they are used."""

import random
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from endor.errors import BackendError, ConfigError
from endor.offload.hot_experts import kinds
from endor.planning.tiers import Exchanges, Placement
from endor.planning.units import collect_units

from ..support.fake_device import FakeDevice
from ..support.packed_files import loaders, make_packed

EXPERTS, HOT, LAYERS = 8, 3, 2
ALWAYS = Exchanges(gain=100.0, step_bytes=1 << 30)


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """Two layers of four experts each, whose sizes differ a little, and two other matrices."""
    shapes = [(64 + 2 * (at % 3), 128) for at in range(EXPERTS)] + [(48, 64), (64, 64)]
    path = tmp_path_factory.mktemp("packed") / "a.safetensors"
    return make_packed(path, shapes, routed=range(EXPERTS), codec="raw")


def placement(tier: str, exchanges: Exchanges | None = ALWAYS, slots: int = 2) -> Placement:
    tiers = {f"w{at}": "vram" if at < HOT else tier for at in range(EXPERTS)}
    tiers |= {"w8": "resident", "w9": "vram"}
    return Placement(tiers, 0, slots, exchanges=exchanges)


def group(layer: int) -> list[str]:
    return [f"w{at}" for at in range(EXPERTS) if at % LAYERS == layer]


def inputs(cols: int, rows: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rows)
    return torch.randn(rows, cols, generator=generator).to(torch.bfloat16)


def route(store, layer: int, chosen: list[str]) -> None:
    mover = store.movers[0]
    mover.hint([mover.states[name] for name in chosen], group=layer)


def step(store, plain, chosen: dict[int, list[str]], *, rows: int = 1, product: bool = True):
    """Run a step: each layer routes, and every chosen expert gives what the processor gives."""
    for layer, names in sorted(chosen.items()):
        route(store, layer, names)
        for name in names:
            weight, other = store.weights[name], plain.weights[name]
            if product and rows <= weight.product_rows:
                x = inputs(weight.shape[1], rows)
                found, expected = weight.product(x), other.product(x)
                # A device may multiply by what it expanded, which rounds to the weight's type.
                assert ((found - expected).abs() <= 1e-4 + 2.0**-8 * expected.abs()).all()
            found = weight.dense().view(torch.int16)
            assert torch.equal(found, other.fresh().view(torch.int16))
        store.movers[0].drop()


def in_vram(store) -> set[str]:
    hot = store.movers[0].hot
    return {f"w{at}" for at in range(EXPERTS) if at in hot}


@pytest.mark.parametrize("tier", ["host", "resident"])
def test_experts_that_are_used_take_the_place_of_those_that_are_not(packed, tier):
    device = FakeDevice()
    store, plain = packed.store(placement(tier), device=device), packed.store()
    store.preload()
    assert in_vram(store) == {"w0", "w1"} or in_vram(store) == {"w0", "w1", "w2"}
    homes = store.movers[0].hot.report()["homes"]
    for _ in range(4):
        step(store, plain, {0: ["w4", "w6"], 1: ["w5"]})
        store.movers[0].hot.settle()
    found, counters = in_vram(store), store.ledger.counters
    assert found <= {"w4", "w5", "w6"}
    assert len(found) == homes >= 2
    assert counters.hot_uses == 12
    assert 0 < counters.hot_hits < counters.hot_uses
    assert counters.exchanges == 2 * homes  # the first ones, and those in their place
    assert counters.exchange_bytes > 0
    before = counters.host_products
    step(store, plain, {0: sorted(found)})
    assert counters.host_products == before  # all of it is on the device
    assert store.report()["hot_experts"]["used"] == homes
    assert device.errors == []
    store.close()
    plain.close()
    assert device.pinned_bytes == 0


def test_products_in_vram_have_the_bits_that_they_have_without_exchanges(packed):
    """Where all is on the device, whoever brought it."""
    moving = packed.store(placement("host"), device=FakeDevice())
    tiers = {f"w{at}": "vram" for at in range(EXPERTS)} | {"w8": "vram", "w9": "vram"}
    fixed = packed.store(Placement(tiers, 0), device=FakeDevice())
    moving.preload()
    for _ in range(3):
        route(moving, 0, ["w4", "w6"])
        moving.movers[0].hot.settle()
    there = in_vram(moving)
    assert there & {"w4", "w6"}
    for name in there:
        x = inputs(moving.weights[name].shape[1], 3)
        found, expected = moving.weights[name].product(x), fixed.weights[name].product(x)
        assert torch.equal(found.view(torch.int32), expected.view(torch.int32))
    assert moving.ledger.counters.host_products == 0
    moving.close()
    fixed.close()


def test_an_exchange_that_does_not_pay_is_left(packed):
    """Uses that are saved, in times of a copy, must be more than the copy."""
    store = packed.store(placement("host", Exchanges(0.3, 1 << 30)), device=FakeDevice())
    store.preload()
    first, hot = in_vram(store), store.movers[0].hot
    for _ in range(3):  # three uses save 0.9 copies
        route(store, 0, ["w6"])
        hot.settle()
    assert in_vram(store) == first
    for _ in range(3):
        route(store, 0, ["w6"])
        hot.settle()
    assert "w6" in in_vram(store)
    store.close()


def test_without_gain_nothing_moves(packed):
    store = packed.store(placement("host", Exchanges(0.0, 1 << 30)), device=FakeDevice())
    store.preload()
    first = in_vram(store)
    for _ in range(20):
        route(store, 0, ["w6"])
        store.movers[0].hot.settle()
    assert in_vram(store) == first
    store.close()


def test_a_step_copies_no_more_than_it_may(packed):
    largest = packed.largest
    store = packed.store(placement("host", Exchanges(100.0, largest // 4)), device=FakeDevice())
    store.preload()
    first, counters = store.ledger.counters.exchanges, store.ledger.counters
    for at in range(1, 13):
        route(store, 0, ["w4", "w6"] if at % 2 else ["w3", "w5"])
        store.movers[0].hot.settle()
        assert counters.exchanges - first <= at // 4 + 1
    assert counters.exchanges > first
    store.close()


def test_homes_take_what_the_placement_gave_those_in_vram(packed):
    device = FakeDevice()
    planned = placement("host")
    given = sum(u.nbytes for u in packed.units if planned.tiers[u.name] == "vram")
    store = packed.store(planned, device=device)
    mover = store.movers[0]
    assert mover.vram_bytes - mover.slot_bytes <= given
    store.preload()
    assert device.allocated_bytes <= given + mover.slot_bytes
    assert mover.host.held_nbytes >= sum(u.nbytes for u in packed.units if not u.scheduled)
    store.close()


def test_experts_on_disk_keep_the_others_where_they_are(packed):
    tiers = dict(placement("host").tiers) | {"w7": "disk"}
    place = Placement(tiers, 2 * packed.largest, 2, exchanges=ALWAYS)
    store = packed.store(place, device=FakeDevice())
    assert store.movers[0].hot is None
    store.close()


def test_exchanges_that_make_no_sense_are_refused(packed):
    for wrong in (Exchanges(-1.0, 1), Exchanges(float("nan"), 1), Exchanges(1.0, -1)):
        with pytest.raises(ConfigError, match="exchanges"):
            packed.store(placement("host", wrong), device=FakeDevice())


def test_a_capture_is_refused(packed):
    device = FakeDevice()
    store = packed.store(placement("host"), device=device)
    store.preload()
    with device.capture(), pytest.raises(BackendError, match="may leave VRAM"):
        store.movers[0].take(store.movers[0].states["w0"])
    store.close()


def test_a_home_is_not_overwritten_while_a_product_reads_it(packed):
    """The product is enqueued, the device has not come to it: its expert is replaced meanwhile."""
    device = FakeDevice(bytes_per_s=1e6)
    store = packed.store(placement("host"), device=device)
    store.preload()
    mover = store.movers[0]
    for name in sorted(in_vram(store)):
        held = mover.take(mover.states[name])
        memory = held.storage.numpy()
        before = memory.copy()
        wrong: list[str] = []

        def look(memory=memory, before=before, wrong=wrong, name=name) -> None:
            if not np.array_equal(memory, before):
                wrong.append(name)

        device.compute(0.5, look, look)
        mover.release(held)
        assert not wrong
    for _ in range(3):
        route(store, 0, ["w4", "w6"])
        route(store, 1, ["w5"])
        mover.hot.settle()
    device.drain()
    assert not wrong
    assert in_vram(store) <= {"w4", "w5", "w6"}
    assert device.now > 0.5  # the copies waited for the products
    assert device.errors == []
    store.close()


def test_an_expert_in_use_stays(packed):
    store = packed.store(placement("host"), device=FakeDevice())
    store.preload()
    mover = store.movers[0]
    kept = sorted(in_vram(store))[0]
    held = mover.take(mover.states[kept])
    for _ in range(3):
        route(store, 0, ["w4", "w6"])
        route(store, 1, ["w5", "w7"])
        mover.hot.settle()
    assert kept in in_vram(store)
    mover.release(held)
    for _ in range(3):
        route(store, 0, ["w4", "w6"])
        route(store, 1, ["w5", "w7"])
        mover.hot.settle()
    assert kept not in in_vram(store)
    store.close()


class Faulty(FakeDevice):
    """A device with random latencies whose copies fail when they are told to."""

    def __init__(self, rng: random.Random) -> None:
        super().__init__(
            bytes_per_s=10.0 ** rng.uniform(5, 9), latency_s=lambda: rng.choice([0.0, 1e-6, 1e-3])
        )
        self.rng = rng
        self.share = 0.0

    def copy(self, destination, source) -> None:
        if self.rng.random() < self.share:
            raise BackendError("the simulated link failed")
        super().copy(destination, source)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    seed=st.integers(0, 2**32),
    tier=st.sampled_from(["host", "resident"]),
    fails=st.booleans(),
    slots=st.integers(1, 3),
    steps=st.lists(
        st.tuples(
            st.sets(st.sampled_from(group(0)), min_size=1, max_size=3),
            st.sets(st.sampled_from(group(1)), min_size=1, max_size=3),
            st.sampled_from([1, 3, 8, 9]),
        ),
        min_size=1,
        max_size=12,
    ),
)
def test_any_routing_gives_the_processors_results(packed, seed, tier, fails, slots, steps):
    """Random routers, latencies and failures; the bytes are right, and VRAM is as it was given."""
    rng, threads = random.Random(seed), loaders()
    device = Faulty(rng)
    limit = rng.choice([0, packed.largest // 2, 1 << 30])
    planned = placement(tier, Exchanges(10.0 ** rng.uniform(-1, 2), limit), slots)
    store, plain = packed.store(planned, device=device), packed.store()
    mover = store.movers[0]
    given_bytes = sum(u.nbytes for u in packed.units if planned.tiers[u.name] == "vram")
    try:
        if rng.random() < 0.7:
            store.preload()
        for first, second, rows in steps:
            device.share = 0.3 if fails else 0.0
            try:
                step(store, plain, {0: sorted(first), 1: sorted(second)}, rows=rows)
            except BackendError:
                assert fails
            mover.drop()
            if rng.random() < 0.5:
                mover.hot.settle()
            assert mover.vram_bytes - mover.slot_bytes <= given_bytes
        device.share = 0.0
        everything = {layer: group(layer) for layer in range(LAYERS)}
        step(store, plain, everything)
        assert device.errors == []
        counters = store.ledger.counters
        assert counters.hot_hits <= counters.hot_uses
    finally:
        store.close()
        plain.close()
    assert device.pinned_bytes == 0
    assert loaders() <= threads


@settings(deadline=None)
@given(st.lists(st.integers(1, 1000), max_size=30))
def test_a_home_of_a_kind_takes_all_of_it(sizes):
    found = kinds(sizes)
    for size, (_, largest) in zip(sizes, found, strict=True):
        assert 0.875 * largest <= size <= largest
    order = sorted(zip(sizes, found, strict=True), reverse=True)
    for (_, (one, largest)), (size, (other, _)) in pairwise(order):
        assert other - one == (size < 0.875 * largest)


def test_the_pool_is_what_is_routed_and_in_memory(packed):
    units = collect_units([packed.layout], packed.specs)
    planned = placement("host")
    assert [unit.name for unit in planned.pool(units)] == [f"w{at}" for at in range(EXPERTS)]
    assert [unit.name for unit in planned.moving(units)] == ["w0", "w1", "w2"]
    assert planned.as_used(units).tiers["w0"] == "host"
    assert planned.as_used(units).tiers["w9"] == "vram"
    assert placement("resident").as_used(units).tiers["w0"] == "resident"
    assert placement("host", None).as_used(units).tiers["w0"] == "vram"
