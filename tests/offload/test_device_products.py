"""Products on a simulated device: prepared once, the faster way chosen once and remembered."""

import json

import pytest
import torch

import endor
from endor import machine
from endor.errors import BackendError
from endor.offload.device_weight import DeviceScratch
from endor.offload.store import Store
from endor.offload.tuning import name_of
from endor.planning import Part, WeightSpec, collect_units
from endor.planning.tiers import Placement
from endor.storage import FileLayout, open_reader

from ..support.fake_device import FakeDevice

COLS = 128
NAMES = [f"layers.{at}.weight" for at in range(4)]


@pytest.fixture(scope="module", params=["raw", "exp"])
def layout(request, tmp_path_factory) -> FileLayout:
    generator = torch.Generator().manual_seed(2)
    path = tmp_path_factory.mktemp("packed") / "weights.safetensors"
    packed = {}
    for name in NAMES:
        weight = torch.randn(96, COLS, generator=generator).to(torch.bfloat16)
        weight[weight.abs() <= weight.abs().float().median()] = 0
        packed[name] = endor.compress(weight, codec=request.param)
    endor.save_file(packed, path)
    return FileLayout.read(path)


@pytest.fixture(autouse=True)
def _cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def opened():
    stores = []
    yield stores
    for store in stores:
        store.close()
        assert store.movers[0].device.errors == []


def open_store(layout, opened, device: FakeDevice, *, tier="vram", slots=0) -> Store:
    """Every stored tensor is a weight; the first two together are one more."""
    specs = [
        (WeightSpec(name, (96, COLS), (Part(name, 0, 96 * COLS, 0),), name), torch.bfloat16)
        for name in NAMES
    ]
    parts = tuple(Part(name, 0, 96 * COLS, at * 96 * COLS) for at, name in enumerate(NAMES[:2]))
    specs.append((WeightSpec("fused", (192, COLS), parts, "fused"), torch.bfloat16))
    units = collect_units([layout], [spec for spec, _ in specs])
    placement = Placement({unit.name: tier for unit in units}, 0, slots, {})
    store = Store.open([layout], units, specs, placement, open_reader("buffered"), device=device)
    opened.append(store)
    return store


def multiply(store: Store, rows: int, seed: int = 0) -> None:
    """Multiply by every weight, and compare with its dense form."""
    x = torch.randn(rows, COLS, generator=torch.Generator().manual_seed(seed)).to(torch.bfloat16)
    for weight in store.weights.values():
        expected = x.double() @ weight.fresh().double().T
        found = weight.product(x).double()
        assert (found - expected).abs().max() <= 2.0**-7 * expected.abs().max()


def test_a_resident_weight_is_prepared_once(layout, opened):
    device = FakeDevice()
    store = open_store(layout, opened, device)
    multiply(store, 1)
    prepared = len(device.products)
    assert prepared == len(NAMES) + 2, "the fused weight has two parts"
    for seed in range(3):
        multiply(store, 1, seed)
    assert len(device.products) == prepared


def test_weights_that_pass_through_slots_are_prepared_once_a_slot(layout, opened):
    device = FakeDevice()
    store = open_store(layout, opened, device, tier="resident", slots=2)
    for seed in range(6):
        multiply(store, 1 + seed % 2, seed)
    assert len(device.products) <= 2 * (len(NAMES) + 2)
    store.close()
    opened.clear()
    multiply_again = open_store(layout, opened, FakeDevice(), tier="resident", slots=2)
    multiply(multiply_again, 3)


@pytest.mark.parametrize(("product", "packed"), [(1.0, True), (2.5, False)])
def test_the_faster_way_is_measured_once_a_shape(layout, opened, product, packed):
    device = FakeDevice()
    device.costs_s["product"] = product
    store = open_store(layout, opened, device)
    multiply(store, 1)
    assert device.measured == 2, "the weights are alike"
    multiply(store, 7)
    multiply(store, 8)
    assert device.measured == 4, "7 and 8 rows are one kernel's"
    before = [each.runs for each in device.products]
    multiply(store, 1)
    multiply(store, 8)
    after = [each.runs for each in device.products]
    expected = [runs + (2 if packed else 0) for runs in before]
    assert after == expected


def test_what_was_measured_is_remembered_for_the_card(layout, opened):
    multiply(open_store(layout, opened, FakeDevice()), 2)
    again = FakeDevice()
    multiply(open_store(layout, opened, again), 2)
    assert again.measured == 0
    other = FakeDevice()
    other.card = "another"
    multiply(open_store(layout, opened, other), 2)
    assert other.measured == 2
    assert len(json.loads(machine.cache_path().read_text())["products"]) == 2


def test_a_damaged_memory_is_measured_anew(layout, opened):
    device = FakeDevice()
    store = open_store(layout, opened, device)
    multiply(store, 1)
    path = machine.cache_path()
    content = json.loads(path.read_text())
    spec = layout.tensors[NAMES[0]].spec
    for damage in ({name_of(spec, 1): "yes"}, ["no"], None):
        content["products"] = {machine.digest(device.facts()): damage}
        path.write_text(json.dumps(content))
        again = FakeDevice()
        multiply(open_store(layout, opened, again), 1)
        assert again.measured == 2


def test_each_scratch_asks_for_its_own_card():
    one, two = FakeDevice(), FakeDevice()
    two.card = "another"
    assert DeviceScratch(one, 256).tuner._key != DeviceScratch(two, 256).tuner._key


def step(store: Store, rows: int = 1) -> None:
    """What a decode step asks of the weights: products, and one that is expanded."""
    x = torch.ones(rows, COLS, dtype=torch.bfloat16)
    for weight in store.weights.values():
        weight.product(x)
        weight.dense()


@pytest.mark.parametrize("product", [1.0, 2.5])
def test_a_step_of_resident_weights_can_be_captured(layout, opened, product):
    """After a first run; and later runs do not wait for what the capture recorded."""
    device = FakeDevice()
    device.costs_s["product"] = product
    store = open_store(layout, opened, device)
    step(store)
    for _ in range(2):
        with device.capture():
            step(store)
        step(store)
    multiply(store, 1)


def test_a_capture_without_a_first_run_is_refused(layout, opened):
    device = FakeDevice()
    store = open_store(layout, opened, device)
    with device.capture(), pytest.raises(BackendError, match="run the step once before"):
        step(store)
    step(store)
    assert device.measured
    measured = device.measured
    with device.capture():
        step(store, rows=4)
    assert device.measured == measured, "nothing is timed, and nothing remembered"
    step(store, rows=4)
    assert device.measured == measured + 2


@pytest.mark.parametrize("slots", [2, 3])
def test_units_outside_vram_cannot_be_captured(layout, opened, slots):
    device = FakeDevice()
    store = open_store(layout, opened, device, tier="resident", slots=slots)
    step(store)
    with device.capture(), pytest.raises(BackendError, match=r"layers\.0\.weight is not in VRAM"):
        step(store)
    step(store)
    multiply(store, 1)


def test_what_cuda_refuses_is_refused():
    """The simulated device's own rules: without them the tests above would say nothing."""
    device = FakeDevice()
    before, inside = device.event(), device.event()
    device.record_compute(before)
    with device.capture():
        with pytest.raises(BackendError, match="allocated while"):
            device.allocate(256)
        with pytest.raises(BackendError, match="the other side of a capture"):
            device.await_in_compute(before)
        device.record_compute(inside)
        device.await_in_compute(inside)
        with pytest.raises(BackendError, match="the other side of a capture"):
            device.await_in_copy(inside)
        with pytest.raises(BackendError, match="waits for an event while"):
            device.synchronize(before)
    with pytest.raises(BackendError, match="the other side of a capture"):
        device.await_in_compute(inside)
    device.record_compute(inside)
    device.await_in_compute(inside)
