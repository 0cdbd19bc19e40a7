"""Weights of a real packed checkpoint, through every tier, on the simulated device."""

import gc
import re
import threading

import numpy as np
import pytest
import torch

import endor
from endor.bench.timeline import summarise
from endor.bench.timeline_page import TIERS, write_report
from endor.errors import BackendError, ChecksumError, ConfigError
from endor.offload import pinned
from endor.offload.ledger import Ledger
from endor.offload.store import Store
from endor.planning import Part, Unit, WeightSpec, collect_units
from endor.planning.tiers import Placement
from endor.storage import FileLayout, open_reader

from ..support.fake_device import FakeDevice, current_index

COUNT = 9


@pytest.fixture(scope="module")
def tensors() -> dict[str, torch.Tensor]:
    """Weights of several shapes and codecs; one much larger than the others."""
    generator = torch.Generator().manual_seed(3)
    out = {}
    for at in range(COUNT):
        rows = 640 if at == COUNT - 1 else 48 + 16 * at
        weight = torch.randn(rows, 96, generator=generator).to(torch.bfloat16)
        if at % 3:
            weight[weight.abs() < 0.7] = 0
        out[f"layers.{at}.weight"] = weight
    return out


@pytest.fixture(scope="module")
def layout(tensors, tmp_path_factory) -> FileLayout:
    path = tmp_path_factory.mktemp("packed") / "weights.safetensors"
    packed = {
        name: endor.compress(weight, codec=("auto", "raw", "exp")[at % 3])
        for at, (name, weight) in enumerate(tensors.items())
    }
    endor.save_file(packed, path)
    return FileLayout.read(path)


def whole(layout: FileLayout) -> list[tuple[WeightSpec, torch.dtype]]:
    """Each stored tensor is a weight."""
    return [
        (
            WeightSpec(name, entry.spec.shape, (Part(name, 0, entry.spec.numel, 0),), name),
            torch.bfloat16,
        )
        for name, entry in layout.tensors.items()
    ]


def open_store(layout, placement, specs=None, **options) -> Store:
    device = options.pop("device", None) or FakeDevice(bytes_per_s=1e6)
    specs = specs or whole(layout)
    units = collect_units([layout], [spec for spec, _ in specs])
    return Store.open(
        [layout],
        units,
        specs,
        placement(units),
        options.pop("reader", None) or open_reader("buffered"),
        device=device,
        **options,
    )


def tiers(*names: str, slots: int = 2):
    """A placement that walks through `names` again and again."""

    def place(units: tuple[Unit, ...]) -> Placement:
        found = {unit.name: names[at % len(names)] for at, unit in enumerate(units)}
        largest = max(unit.nbytes for unit in units)
        passing = {"disk", "vram-dense"} & set(names)
        return Placement(found, 2 * largest if passing else 0, slots)

    return place


PLACEMENTS = [
    tiers("vram"),
    tiers("vram-dense"),
    tiers("resident"),
    tiers("disk"),
    tiers("vram", "resident", "disk"),
    tiers("disk", "vram-dense", "resident", "vram", slots=1),
    tiers("resident", "disk", slots=4),
]


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_every_tier_gives_the_same_bits(layout, tensors, placement):
    store = open_store(layout, placement)
    try:
        store.preload()
        for _ in range(3):
            for name, weight in store.weights.items():
                assert torch.equal(weight.dense(), tensors[name])
                assert torch.equal(weight.fresh(), tensors[name])
        device = store.movers[0].device
        assert isinstance(device, FakeDevice)
        assert device.errors == []
        report = store.report()
        assert sum(entry["units"] for entry in report["tiers"].values()) == len(store.units)
    finally:
        store.close()


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_a_report_says_one_tier_of_a_unit(layout, placement, tmp_path):
    store = open_store(layout, placement)
    try:
        path = tmp_path / "report.html"
        summary = write_report(path, store, seconds=(0.0, 1.0))
        page = path.read_text()
    finally:
        store.close()
    where = placement(store.units).tiers
    assert {row.name: row.tier for row in summary.units} == dict(where)
    for tier, total in summary.tiers.items():
        rows = [row for row in summary.units if row.tier == tier]
        assert total == {"units": len(rows), "nbytes": sum(row.nbytes for row in rows)}
    legend = re.findall(r'class="legend">(.*?)</p>', page)[-1]
    for tier, text in TIERS.items():
        assert (text in legend) == (tier in where.values())


def test_a_report_on_several_devices_says_one_tier_of_a_unit(layout):
    specs, ledger = whole(layout), Ledger()
    halves = (specs[:4], tiers("vram", "disk")), (specs[4:], tiers("resident", "vram-dense"))
    stores = [open_store(layout, place, half, ledger=ledger) for half, place in halves]
    group = Store([layout], [store.shares[0] for store in stores])
    try:
        summary = summarise(group, (0.0, 1.0))
    finally:
        group.close()
    where = {
        name: tier
        for store, (_, place) in zip(stores, halves, strict=True)
        for name, tier in place(store.units).tiers.items()
    }
    assert {row.name: row.tier for row in summary.units} == where
    assert set(summary.tiers) == {"vram", "disk", "resident", "vram-dense"}
    assert sum(total["units"] for total in summary.tiers.values()) == len(specs)


def test_two_scratch_buffers_take_turns(layout, tensors):
    store = open_store(layout, tiers("resident"))
    names = list(tensors)
    first, second = (store.weights[name].dense() for name in names[:2])
    assert torch.equal(first, tensors[names[0]])
    assert torch.equal(second, tensors[names[1]])
    third = store.weights[names[2]].dense()
    assert third.data_ptr() == first.data_ptr()
    store.close()


def test_threads_share_a_store(layout, tensors):
    store = open_store(layout, tiers("disk", "resident", "vram", slots=2))
    wrong: list[str] = []

    def walk(names: list[str]) -> None:
        for name in names:
            if not torch.equal(store.weights[name].fresh(), tensors[name]):
                wrong.append(name)

    orders = [list(tensors), list(tensors)[::-1], list(tensors) * 2]
    threads = [threading.Thread(target=walk, args=(order,), daemon=True) for order in orders]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert wrong == []
    store.close()


def test_parts_of_tensors_are_placed(layout, tensors):
    """Rows of two stored matrices make one weight; one range begins in the middle of a tensor."""
    (a, first), (b, second) = list(tensors.items())[1:3]
    parts = (Part(a, 96 * 3, 96 * 10, 0), Part(b, 0, second.numel(), 96 * 7))
    spec = WeightSpec("joined", (7 + len(second), 96), parts, "joined")
    odd = WeightSpec("odd", (1, 5), (Part(a, 101, 106, 0),), "odd")
    store = open_store(layout, tiers("resident"), [(spec, torch.bfloat16), (odd, torch.float32)])
    assert torch.equal(store.weights["joined"].dense(), torch.cat([first[3:10], second]))
    expected = first.flatten()[101:106].float().view(1, 5)
    assert torch.equal(store.weights["odd"].dense(), expected)
    assert torch.equal(store.weights["odd"].fresh(), expected)
    store.close()


def test_a_held_unit_is_copied_once(layout, tensors):
    store = open_store(layout, tiers("resident", slots=1))
    (mover,) = store.movers
    weight = store.weights["layers.4.weight"]
    for _ in range(5):
        assert torch.equal(weight.dense(hold=True), tensors["layers.4.weight"])
    copies = mover.report()["copier"]
    assert copies["hits"] + copies["late"] + copies["misses"] == 1
    mover.drop()
    assert torch.equal(store.weights["layers.0.weight"].dense(), tensors["layers.0.weight"])
    store.close()


class DirectReader:
    """A reader that also reads into the simulated device's memory."""

    reads_device = True

    def __init__(self) -> None:
        self.inner = open_reader("buffered")
        self.device_reads = 0

    def read(self, record, buffer):
        if isinstance(buffer, torch.Tensor):
            self.device_reads += 1
            data = np.fromfile(record.path, np.uint8, record.nbytes, offset=record.offset)
            buffer[: record.nbytes] = torch.from_numpy(data)
            return type("Stat", (), {"nbytes": record.nbytes})
        return self.inner.read(record, buffer)

    def describe(self):
        return self.inner.describe()

    def close(self) -> None:
        self.inner.close()


def test_a_direct_reader_fills_slots_without_host_memory(layout, tensors):
    reader = DirectReader()
    store = open_store(layout, tiers("disk", "resident", "vram"), reader=reader)
    for _ in range(2):
        for name, weight in store.weights.items():
            assert torch.equal(weight.dense(), tensors[name])
    assert reader.device_reads
    assert store.staging_bytes == 0
    store.close()


@pytest.mark.parametrize("tier", ["vram", "resident", "disk"])
def test_damage_is_found_in_every_tier(layout, tmp_path, tier):
    path = tmp_path / "damaged.safetensors"
    data = bytearray(layout.path.read_bytes())
    record = next(iter(layout.records.values()))
    data[record.offset + 3] ^= 1
    path.write_bytes(data)
    damaged = FileLayout.read(path)
    name = record.tensors[0]
    if tier == "vram":
        with pytest.raises(ChecksumError, match="damaged"):
            open_store(damaged, tiers(tier))
        return
    store = open_store(damaged, tiers(tier))
    with pytest.raises(ChecksumError, match="damaged"):
        store.weights[name].dense()
    store.close()


def test_a_deleted_store_is_freed_at_once(layout):
    """No cycle keeps device memory or threads until the garbage collector comes by."""
    others = set(threading.enumerate())
    store = open_store(layout, tiers("disk", "vram-dense", "resident", "vram"))
    for weight in store.weights.values():
        weight.dense()
    device = store.movers[0].device
    threads = set(threading.enumerate()) - others
    assert threads
    assert device.allocated_bytes
    assert device.pinned_bytes
    gc.disable()
    try:
        del store, weight
        assert device.allocated_bytes == 0
        assert device.pinned_bytes == 0
    finally:
        gc.enable()
    assert not [thread for thread in threads if thread.is_alive()]


def test_a_closed_store_gives_its_memory_back(layout):
    store = open_store(layout, tiers("disk", "vram-dense", "resident", "vram"))
    names = list(store.weights)
    for name in names:
        store.weights[name].dense()
    store.close()
    for name in names:
        with pytest.raises(BackendError, match="were closed"):
            store.weights[name].dense()
    scratch = store.scratch_nbytes
    assert store.movers[0].device.allocated_bytes == scratch
    store.close()


def test_expanded_units_keep_no_packed_bytes(layout, tensors):
    """An expanded unit passes through a slot once; its memory is then the dense weight's alone."""
    store = open_store(layout, tiers("vram-dense"))
    (mover,) = store.movers
    store.preload()
    copies = mover.report()["copier"]["copies"]
    for name, weight in store.weights.items():
        assert torch.equal(weight.dense(), tensors[name])
    assert mover.report()["copier"]["copies"] <= copies + mover.report()["slots"]
    assert store.movers[0].device.allocated_bytes == mover.slot_bytes
    assert mover.vram_bytes == mover.slot_bytes
    store.close()


def test_a_placement_is_checked(layout):
    units = collect_units([layout], [spec for spec, _ in whole(layout)])
    with pytest.raises(ConfigError, match="must be vram-dense"):
        Placement({}, 0).check(units, on_device=True)
    with pytest.raises(ConfigError, match="at least one device slot"):
        Placement({unit.name: "resident" for unit in units}, 0, slots=0).check(
            units, on_device=True
        )


def test_the_callers_device_and_pending_work_are_left_alone(layout, tensors, monkeypatch):
    """A store on device 1, loaded while device 0 is current and device 1 still computes; and
    locked memory in many registrations, whose borders lie inside units."""
    monkeypatch.setattr(pinned, "CHUNK_BYTES", 4096)
    device = FakeDevice(bytes_per_s=1e6, index=1)
    device.compute(1.0, lambda: None, lambda: None)
    store = open_store(layout, tiers("vram", "resident", "disk"), device=device)
    for _ in range(2):
        for name, weight in store.weights.items():
            assert torch.equal(weight.dense(), tensors[name])
    assert current_index() == 0
    assert device.errors == []
    store.close()
    assert device.pinned_bytes == 0
