"""Weights that the host multiplies beside a simulated device: the processor's products, no wait."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import endor
from endor.bench.timeline import summarise
from endor.bench.timeline_page import write_report
from endor.bench.trace import trace
from endor.codecs import Encoded
from endor.errors import BackendError, ChecksumError, ReadError
from endor.offload.exchange import RESULTS, Exchange
from endor.offload.source import cut_up
from endor.offload.store import Store
from endor.planning import Part, WeightSpec, collect_units
from endor.planning.tiers import Placement
from endor.storage import FileLayout, open_reader

from ..support.fake_device import FakeDevice
from ..support.packed_files import Disk, finishes

COLS = 128
KINDS = {
    "raw": {"codec": "raw"},
    "exp": {"codec": "exp"},
    "whole": {"codec": "exp", "dense": True},
    "int": {"bits": 3.5},
    "turned": {"codec": "raw"},
}


@pytest.fixture(scope="module", params=sorted(KINDS))
def layout(request, tmp_path_factory) -> FileLayout:
    """Five weights of one codec."""
    generator = torch.Generator().manual_seed(5)
    path = tmp_path_factory.mktemp("packed") / "weights.safetensors"
    options = dict(KINDS[request.param])
    dense = options.pop("dense", False)
    packed = {}
    for at in range(5):
        weight = torch.randn(64 + 256 * at, COLS, generator=generator).to(torch.bfloat16)
        if not dense and "bits" not in options:
            weight[weight.abs() < 0.7] = 0
        packed[f"layers.{at}.weight"] = (
            turned(weight) if request.param == "turned" else endor.compress(weight, **options)
        )
    endor.save_file(packed, path)
    return FileLayout.read(path)


def turned(weight: torch.Tensor) -> endor.PackedTensor:
    """Return a weight that is stored transposed, as `endor pack --neurons` does."""
    stored = endor.compress(weight.T.contiguous(), codec="raw").data
    spec = stored.spec.turned()
    return endor.PackedTensor(spec, Encoded(spec, stored.arrays))


def specs_of(layout) -> list[tuple[WeightSpec, torch.dtype]]:
    """Each stored tensor is a weight, and the first two together are one."""
    out = [
        (
            WeightSpec(name, entry.spec.shape, (Part(name, 0, entry.spec.numel, 0),), name),
            torch.bfloat16,
        )
        for name, entry in layout.tensors.items()
    ]
    (first, _), (second, _) = out[:2]
    numel = [spec.shape[0] * spec.shape[1] for spec in (first, second)]
    parts = (
        Part(first.name, 0, numel[0], 0),
        Part(second.name, 0, numel[1], numel[0]),
    )
    shape = (first.shape[0] + second.shape[0], COLS)
    return [*out, (WeightSpec("fused", shape, parts, "fused"), torch.bfloat16)]


def open_store(layout, tiers, *, device=None, slots=2, shares=None, disk=None, **options) -> Store:
    """Open all weights, the tiers repeated over the units."""
    specs = specs_of(layout)
    units = collect_units([layout], [spec for spec, _ in specs])
    found = {unit.name: tiers[at % len(tiers)] for at, unit in enumerate(units)}
    staging = 2 * max(unit.nbytes for unit in units) if "disk" in tiers else 0
    placement = Placement(found, staging, slots if device else 0, shares or {})
    reader = open_reader("buffered", **({"preadv": disk} if disk else {}))
    return Store.open([layout], units, specs, placement, reader, device=device, **options)


def inputs(rows: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, COLS, generator=generator).to(torch.bfloat16)


def check(
    found: torch.Tensor, x: torch.Tensor, dense: torch.Tensor, *, rounded: bool = False
) -> None:
    """Assert that a product lies within the tolerance that `kernels.matvec` promises.

    `rounded`: some of it may be torch's, rounded to the weight's type.
    """
    wide, weights = x.double(), dense.double()
    expected, size = wide @ weights.T, wide.abs() @ weights.abs().T
    bound = 2.0**-24 * (COLS / 16 + 16) * size + (2.0**-8 * expected.abs() if rounded else 0)
    assert found.dtype == torch.float32
    assert ((found.double() - expected).abs() <= bound).all()


PLACEMENTS = [("host",), ("host", "vram"), ("resident", "host", "disk"), ("disk", "vram", "host")]


@pytest.mark.parametrize("share", [1.0, 0.6, 0.3, 0.0])
@pytest.mark.parametrize("tiers", PLACEMENTS, ids="-".join)
def test_products_are_those_of_the_processor(layout, tiers, share):
    device = FakeDevice(bytes_per_s=1e8, latency_s=lambda: 1e-5)
    shares = dict.fromkeys(layout.records, share)
    store = open_store(layout, tiers, device=device, shares=shares)
    plain = open_store(layout, ("resident",))
    try:
        hosted = 0
        for name, weight in [*store.weights.items(), *store.weights.items()]:
            dense = plain.weights[name].fresh()
            whole = {store.placement.tiers[state.unit.name] for state in weight.states}
            for rows in (1, 3, 8):
                if not weight.product_rows:
                    continue
                x = inputs(rows)
                found = weight.product(x)
                check(found, x, dense, rounded=whole != {"host"} or share < 1.0)
                if whole == {"host"} and share == 1.0:
                    hosted += 1
                    assert torch.equal(found, plain.weights[name].product(x))
            assert torch.equal(weight.dense(), dense)  # many rows: copied and expanded
            if "host" in whole:
                assert weight.product_rows == 8
        counters = store.ledger.counters
        if share > 0.5:  # what cannot be cut goes where most of its rows would
            assert counters.host_products >= hosted
            assert counters.host_bytes > 0
            assert counters.host_product_s > 0
        elif not share:
            assert counters.host_products == 0
        assert device.errors == []
    finally:
        store.close()
        plain.close()
    assert device.pinned_bytes == 0


def test_inputs_go_down_once_for_a_group(layout):
    device = FakeDevice()
    store = open_store(layout, ("host",), device=device)
    exchange = store.movers[0].exchange
    try:
        names = [name for name in store.weights if name != "fused"]
        x = inputs(1)
        for step in range(3):
            for name in names:
                store.weights[name].product(x.reshape(-1, COLS))
            assert exchange.trips == 1
            assert store.ledger.counters.host_products == (step + 1) * len(names)
        other = inputs(1, seed=1)
        dense = store.weights[names[0]].fresh()
        check(store.weights[names[0]].product(other), other, dense)
        assert exchange.trips == 2
        other.mul_(2)  # the same tensor, written since
        check(store.weights[names[0]].product(other), other, dense)
        assert exchange.trips == 3
        with torch.inference_mode():  # counts no writes
            unseen = inputs(1, seed=2)
            for trips in (4, 5):
                check(store.weights[names[0]].product(unseen), unseen, dense)
                assert exchange.trips == trips
                unseen.mul_(3)
        assert device.errors == []
    finally:
        store.close()


def test_a_freed_input_is_not_taken_for_the_next_one(layout):
    """The memory of an input that was let go is soon another's, at the same address."""
    device = FakeDevice()
    store = open_store(layout, ("host",), device=device)
    name = next(iter(store.weights))
    dense = store.weights[name].fresh()
    try:
        for seed in range(20):
            x = inputs(1, seed)
            check(store.weights[name].product(x), x, dense)
            del x
    finally:
        store.close()


def test_copies_go_on_while_the_host_multiplies(layout):
    """The copy of a streamed unit is enqueued before, and runs on, while activations travel."""
    device = FakeDevice(bytes_per_s=1e3)
    store = open_store(layout, ("host", "resident"), device=device)
    try:
        names = [name for name in store.weights if name != "fused"]
        x = inputs(1)
        before = device.now
        store.weights[names[0]].product(x)
        waited = device.now - before
        # Its own few hundred bytes, not a unit's tens of thousands, which take their time behind.
        assert waited < 2 * (x.numel() * 2 + 4 * 64) / 1e3
        assert device.errors == []
    finally:
        store.close()


def test_threads_have_buffers_of_their_own(layout):
    device = FakeDevice()
    store = open_store(layout, ("host",), device=device)
    plain = open_store(layout, ("resident",))
    names = [name for name in store.weights if name != "fused"]
    dense = {name: plain.weights[name].fresh() for name in names}

    def work(seed: int):
        def run() -> None:
            with device.current():
                for at in range(12):
                    x = inputs(1 + at % 4, seed + at)
                    for name in names:
                        check(store.weights[name].product(x), x, dense[name])

        return run

    try:
        finishes(*(work(100 * at) for at in range(3)))
        assert device.errors == []
    finally:
        store.close()
        plain.close()
    assert device.pinned_bytes == 0


def test_a_failed_read_is_raised_and_tried_again(layout):
    disk, device = Disk(), FakeDevice()
    disk.failures = 10**6
    store = open_store(layout, ("host",), device=device, disk=disk)
    name = next(iter(store.weights))
    x = inputs(2)
    try:
        with pytest.raises(ReadError):
            store.weights[name].product(x)
        disk.failures = 0
        check(store.weights[name].product(x), x, store.weights[name].fresh())
    finally:
        store.close()


def test_damage_is_raised(layout, tmp_path):
    path = tmp_path / "weights.safetensors"
    data = bytearray(layout.path.read_bytes())
    unit = next(iter(layout.records.values()))
    data[unit.offset + 3] ^= 1
    path.write_bytes(data)
    store = open_store(FileLayout.read(path), ("host",), device=FakeDevice())
    try:
        with pytest.raises(ChecksumError, match=unit.name):
            store.weights[unit.name].product(inputs(1))
    finally:
        store.close()


def test_a_failed_copy_is_raised_and_tried_again(layout):
    class Failing(FakeDevice):
        fails = 0

        def synchronize(self, event) -> None:
            if self.fails:
                self.fails -= 1
                raise BackendError("the device is gone")
            super().synchronize(event)

    device = Failing()
    store = open_store(layout, ("host",), device=device)
    name = next(iter(store.weights))
    x, dense = inputs(1), store.weights[name].fresh()
    try:
        store.preload()
        store.weights[name].product(inputs(1, seed=1))
        device.fails = 1
        with pytest.raises(BackendError, match="gone"):
            store.weights[name].product(x)
        check(store.weights[name].product(x), x, dense)
        assert device.errors == []
    finally:
        store.close()


def test_a_closed_store_refuses(layout):
    device = FakeDevice()
    store = open_store(layout, ("host",), device=device)
    weight = next(iter(store.weights.values()))
    store.preload()
    weight.product(inputs(1))
    store.close()
    with pytest.raises(BackendError, match="closed"):
        weight.product(inputs(1))
    assert device.pinned_bytes == 0


def test_memory_that_cannot_be_locked_is_used_all_the_same(layout):
    device = FakeDevice(pinnable_bytes=0)
    with pytest.warns(RuntimeWarning, match="page-locked"):
        store = open_store(layout, ("host",), device=device)
    try:
        name = next(iter(store.weights))
        x = inputs(2)
        check(store.weights[name].product(x), x, store.weights[name].fresh())
        assert device.errors == []
    finally:
        store.close()


def test_results_are_not_overwritten_while_they_go_up():
    """More results than buffers, on a device that has done nothing yet."""

    class Lazy(FakeDevice):
        def copy_up(self, destination, source) -> None:
            for begin, end in self._locks.pieces(source):
                self._copy_piece(destination[begin:], source[begin:end], self.compute_stream())

    device = Lazy(bytes_per_s=10.0)
    exchange = Exchange(device)
    outs = [torch.zeros(1, 4) for _ in range(3 * RESULTS)]
    for at, out in enumerate(outs):
        result = exchange.result(1, 4)
        result[:] = at
        exchange.receive(out, result)
    device.drain()
    assert [float(out[0, 3]) for out in outs] == list(range(len(outs)))
    assert device.errors == []
    exchange.close()
    exchange.close()
    with pytest.raises(BackendError, match="closed"):
        exchange.result(1, 4)
    assert device.pinned_bytes == 0


def test_buffers_grow_and_are_counted():
    device = FakeDevice()
    exchange = Exchange(device)
    for size in (8, 64, 16, 4096):
        x = torch.arange(size, dtype=torch.float32)
        exchange.send(x)
        assert np.array_equal(exchange.arrived().view(np.float32), x.numpy())
    assert exchange.nbytes == 4 * 4096
    exchange.close()
    assert device.errors == []


def test_a_report_shows_host_products_beside_copies(layout, tmp_path):
    store = open_store(layout, ("host", "resident"), device=FakeDevice(), slots=1)
    try:
        names = [name for name in store.weights if name != "fused"]
        for _ in range(3):
            for name in names:
                weight = store.weights[name]
                if weight.product_rows:
                    weight.product(inputs(1))
                else:
                    weight.dense()
        kinds = {event.kind for event in store.ledger.events}
        assert {"host product", "copy"} <= kinds
        times = [event.start_s for event in store.ledger.events]
        ends = [event.stop_s for event in store.ledger.events]
        summary = summarise(store, (min(times), max(ends)))
        assert {row.tier for row in summary.units} == {"host", "resident"}
        page = tmp_path / "report.html"
        write_report(page, store, seconds=(min(times), max(ends)), title="x")
        text = page.read_text()
        assert "packed in RAM, few rows multiplied there" in text
        assert "on the processor beside a device" in text
        assert ">copies<" in text
        rows = [each for each in trace(store.ledger.events)["traceEvents"] if each["ph"] == "M"]
        assert any(row["args"]["name"].startswith("copies") for row in rows)
    finally:
        store.close()


@settings(max_examples=50, deadline=None)
@given(sizes=st.lists(st.integers(0, 50), max_size=5), limit=st.integers(1, 20))
def test_copies_are_cut_up_into_the_same_bytes(sizes, limit):
    rng = np.random.default_rng(len(sizes))
    pieces, at = [], 0
    for size in sizes:
        pieces.append((at, rng.integers(0, 255, size, dtype=np.uint8)))
        at += size + 3
    found = cut_up(pieces, limit)
    assert all(0 < data.nbytes <= limit for _, data in found)
    whole, again = np.zeros((2, at), np.uint8)
    for memory, parts in ((whole, pieces), (again, found)):
        for start, data in parts:
            memory[start : start + data.nbytes] = data
    assert np.array_equal(whole, again)
