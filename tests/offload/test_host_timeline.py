"""The simulated time of a decode step whose weights two processors share, beside its bound.

The example: 70 billion weights, half of them pruned, 52 GB packed; a card of 24 GB behind PCIe 4
x16 (24 GB/s), and a memory that gives a packed product 48 GB/s. Small matrices stand for large
ones: every rate is scaled by what they are smaller.
"""

import threading
import time

import numpy as np
import pytest
import torch

import endor
from endor import kernels
from endor.offload import beside_weight
from endor.offload.store import Store
from endor.planning import Part, WeightSpec, collect_units, cost
from endor.planning.constants import KINDS, Disk, Link, Machine
from endor.planning.plan import Workload, plan
from endor.planning.shape import ModelShape
from endor.planning.tiers import COPY_PIECE_BYTES
from endor.storage import FileLayout, open_reader

from ..support.fake_device import FakeDevice, FakeExpansion, encoded_of

PACKED, VRAM, LINK, HOST, CARD = 52e9, 24e9, 24e9, 48e9, 1008e9 * 0.85
COUNT, ROWS, COLS = 70, 256, 1024


class TimedProduct:
    """Takes the time that the card needs for the packed bytes."""

    def __init__(self, device: "TimedDevice", packed) -> None:
        self.device, self.packed = device, packed

    def run(self, x, out) -> None:
        bits = x.view(torch.int16).numpy().view(np.uint16)

        def end() -> None:
            found = np.empty(tuple(out.shape), np.float32)
            kernels.matvec(encoded_of(self.packed), bits, found, threads=1)
            self.device.results.append(found)

        seconds = self.packed.spec.nbytes / (CARD * self.device.scale)
        self.device.compute(seconds, lambda: None, end)


class TimedDevice(FakeDevice):
    """Computes when the clock comes to it, and lets the clock run only while no copier has work."""

    def __init__(self, scale: float) -> None:
        super().__init__(bytes_per_s=LINK * scale)
        self.scale = scale
        self.copier = None
        self.results: list[np.ndarray] = []
        self._main = threading.get_ident()

    def prepare_product(self, packed) -> "TimedProduct":
        return TimedProduct(self, packed)

    def prepare(self, items) -> FakeExpansion:
        raise AssertionError("every product is straight from the packed form")

    def seconds(self, work) -> float:
        return 0.0  # no time is lost by products from the packed form

    def advance(self, seconds: float) -> None:
        self._quiet()
        super().advance(seconds)

    def synchronize(self, event) -> None:
        self._quiet()
        super().synchronize(event)

    def _quiet(self) -> None:
        """Wait until the copier has issued what it can: a host is never that slow."""
        if self.copier is None or threading.get_ident() != self._main:
            return
        stop = time.monotonic() + 60
        while True:
            with self.copier._lock:
                if len(self.copier._work._waiters) == len(self.copier._threads):
                    return
            assert time.monotonic() < stop
            time.sleep(0)


@pytest.fixture(scope="module")
def layout(tmp_path_factory) -> FileLayout:
    generator = torch.Generator().manual_seed(2)
    path = tmp_path_factory.mktemp("packed") / "weights.safetensors"
    packed = {}
    for at in range(COUNT):
        weight = torch.randn(ROWS, COLS, generator=generator).to(torch.bfloat16)
        weight[weight.abs() < 0.67] = 0
        packed[f"layers.{at}.weight"] = endor.compress(weight, codec="raw")
    endor.save_file(packed, path)
    return FileLayout.read(path)


def planned(units, scale: float):
    """Return the plan of the example on a machine that much smaller, with its best ways."""
    rates = dict.fromkeys(KINDS, HOST * scale / 1e9)
    # The card multiplies from the packed form; the model's expansion and product move more bytes.
    packed, dense = units[0].nbytes, units[0].dense_nbytes
    memory = CARD * scale * (packed + 2 * dense) / packed / 1e9
    link = Link("card", int(VRAM * scale), LINK * scale / 1e9, 1e-6, memory, 1e-6, 1e6)
    machine = Machine("BF16", 1, 1e6, 1e6, rates, rates, 1e6, 1e6, 1e-6, link)
    shape = ModelShape(1, 8, 1, 0, 0, 0, 0, 8)
    return plan(
        units,
        shape,
        machine,
        Disk(1e6, 1e6, 1e6, 1e-9, direct=True),
        ram_bytes=1 << 40,
        # What is reserved for libraries and scratch is of the full size: it comes on top.
        vram_bytes=int(VRAM * scale) + (64 << 20) + 2 * ROWS * COLS * 2,
        workload=Workload(prompt=1, context=1, product="direct"),
    )


@pytest.mark.parametrize("way", ["both", "host", "stream"])
def test_a_step_takes_what_the_slower_road_takes(layout, monkeypatch, way):
    names = list(layout.tensors)
    numel = ROWS * COLS
    specs = [
        (WeightSpec(name, (ROWS, COLS), (Part(name, 0, numel, 0),), name), torch.bfloat16)
        for name in names
    ]
    units = collect_units([layout], [spec for spec, _ in specs])
    scale = sum(unit.nbytes for unit in units) / PACKED
    monkeypatch.setattr(cost, "COPY_PIECE_BYTES", COPY_PIECE_BYTES * scale)
    found = planned(units, scale)
    chosen = next(each for each in found.alternatives if each.way == way)
    placement = chosen.placement
    assert bool(placement.host_shares) == (way == "both")
    device = TimedDevice(scale)
    multiply = beside_weight.multiply_rows

    def timed(call, encoded, first, operand, result) -> None:
        multiply(call, encoded, first, operand, result)
        share = 1 - first / encoded.spec.shape[0]
        device.advance(share * encoded.spec.nbytes / (HOST * scale))

    monkeypatch.setattr(beside_weight, "multiply_rows", timed)
    store = Store.open([layout], units, specs, placement, open_reader("buffered"), device=device)
    try:
        store.preload()
        device.copier = store.movers[0]._copier
        steps, copied, hosted_bytes = [], [], []
        for _ in range(4):
            before, busy = device.now, device.busy_s()
            hosted = store.ledger.counters.host_bytes
            for at, name in enumerate(names):
                # Every product has inputs of its own: there are no groups in this chain.
                x = torch.randn(1, COLS, generator=torch.Generator().manual_seed(at))
                store.weights[name].product(x.to(torch.bfloat16))
                device.settle()
            steps.append(device.now - before)
            copied.append(device.busy_s() - busy)
            hosted_bytes.append(store.ledger.counters.host_bytes - hosted)
        seconds = sum(steps[1:]) / 3
        bound = max(sum(copied[1:]) / 3, sum(hosted_bytes[1:]) / 3 / (HOST * scale))
        assert bound <= seconds * 1.001
        assert seconds < 1.1 * bound, (seconds, bound)
        assert seconds == pytest.approx(1 / chosen.decode_tokens_per_s, rel=0.1)
        outside = sum(u.nbytes for u in units if not placement.tiers[u.name].startswith("vram"))
        if way == "stream":
            assert seconds == pytest.approx(outside / (LINK * scale), rel=0.1)
        else:
            assert seconds < 1.15 * outside / ((LINK + HOST) * scale)
        assert device.errors == []
    finally:
        store.close()
