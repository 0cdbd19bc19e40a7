"""Blocks of busy neurons that stay in memory: the bits of the product without, fewer bytes read."""

import mmap
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from endor.checkpoint import neuron_counts
from endor.checkpoint.neuron_counts import NeuronCounts
from endor.errors import ConfigError, ReadError
from endor.offload import Store, neuron_blocks, neuron_parts, neuron_reads, store
from endor.offload.neuron_blocks import BlockMemory, busiest, runs, whole_pages
from endor.offload.neuron_parts import Prices
from endor.planning import Part, Placement, WeightSpec, collect_units
from endor.planning.products import Products
from endor.storage import FileLayout, open_reader
from endor.storage.layout import ALIGN

from ..support.packed_files import Disk
from .test_neuron_reads import HIDDEN, HOW, NEURONS, How, inputs, write

TOKENS = 1000


@pytest.fixture(autouse=True)
def _small() -> Iterator[None]:
    """Requests cost so little that parts of small records are worth reading."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(neuron_parts, "WHOLE", 2.0)
        patch.setattr(neuron_reads, "prices", lambda path: Prices(4 << 10, 1.0))
        yield


def skewed(seed: int) -> np.ndarray:
    """Return how often each neuron is active: few of them nearly always, most hardly ever.

    Busy ones lie together: these neurons are so small that several share a block.
    """
    rng = np.random.default_rng(seed)
    counts = np.minimum(TOKENS, TOKENS * 0.004 / rng.random(NEURONS))
    return np.roll(np.sort(counts), 100 * seed).astype(np.uint32)


def opened(
    path: Path, share: float, *, counts: NeuronCounts | None = None, disk: Disk | None = None
) -> Store:
    """Return a store on disk, with so much of each record kept."""
    layout = FileLayout.read(path)
    specs = [
        WeightSpec(name, (HIDDEN, NEURONS), (Part(name, 0, HIDDEN * NEURONS, 0),), name)
        for name in layout.tensors
    ]
    units = collect_units([layout], specs)
    tiers = dict.fromkeys((unit.name for unit in units), "disk")
    kept = {unit.name: int(share * unit.nbytes) for unit in units}
    largest = max(unit.nbytes for unit in units)
    placement = Placement(tiers, 2 * largest, kept_bytes=kept)  # type: ignore[arg-type]
    reader = open_reader(preadv=disk) if disk else open_reader()
    pairs = [(spec, torch.bfloat16) for spec in specs]
    products = Products(packed_rows=dict.fromkeys(tiers, 8))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store, "counted", lambda layouts: counts)
        return Store.open([layout], units, pairs, placement, reader, products=products)


def draw(counts: np.ndarray, seed: int, batch: int = 1) -> torch.Tensor:
    """Return activations of tokens in which neurons are active as often as counted."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((batch, NEURONS)).astype(np.float32)
    x[rng.random((batch, NEURONS)) * TOKENS >= counts] = 0
    return torch.from_numpy(x).bfloat16()


def memory_of(opened: Store) -> BlockMemory:
    reads = opened.shares[0].reads
    assert reads is not None
    return reads._memory


@pytest.mark.parametrize("how", HOW)
@settings(max_examples=8, deadline=None)
@given(
    share=st.sampled_from([0.0, 0.05, 0.3, 0.7, 1.0]),
    known=st.booleans(),
    steps=st.lists(st.tuples(st.integers(0, 99), st.integers(1, 3)), min_size=1, max_size=6),
)
def test_the_bits_are_those_without(
    tmp_path_factory: pytest.TempPathFactory,
    how: How,
    share: float,
    known: bool,
    steps: list[tuple[int, int]],
) -> None:
    path = tmp_path_factory.mktemp("blocks") / "w.safetensors"
    write(path, how)
    counts = {f"w{at}": skewed(at) for at in range(2)}
    plain = opened(path, 0.0)
    kept = opened(path, share, counts=NeuronCounts(TOKENS, counts) if known else None)
    for seed, batch in steps:
        for name in counts:
            x = draw(counts[name], seed, batch)
            expected, found = (each.weights[name].product(x) for each in (plain, kept))
            assert torch.equal(expected.view(torch.int32), found.view(torch.int32))
    memory = memory_of(kept)
    assert memory.kept_bytes <= share * kept.packed_nbytes
    assert memory._loose == sum(blocks.loose for blocks in memory._used.values())
    assert memory._loose <= memory._limit
    plain.close()
    kept.close()


def test_busy_neurons_are_read_no_more(tmp_path: Path) -> None:
    """Of as much memory, that of the busiest blocks saves the most."""
    path = tmp_path / "w.safetensors"
    write(path, ("exp", False, 0), count=8)
    counts = {f"w{at}": skewed(at) for at in range(8)}
    read = {}
    for what, known in (("none", None), ("all alike", None), ("counted", counts)):
        share = 0.0 if what == "none" else 0.3
        kept = opened(path, share, counts=None if known is None else NeuronCounts(TOKENS, known))
        for seed in range(12):
            if seed == 2:
                kept.ledger.clear()
            for name in counts:
                kept.weights[name].product(draw(counts[name], seed))
        counters = kept.ledger.counters
        assert 0 <= counters.neuron_hit_bytes <= counters.neuron_bytes
        read[what] = counters.read_bytes
        kept.close()
    assert read["counted"] < 0.7 * read["all alike"] <= 0.7 * read["none"]


def test_with_all_kept_nothing_is_read(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    write(path, ("raw", None, 0))
    kept = opened(path, 1.0)
    kept.weights["w0"].product(inputs(0.5, 1))
    before = kept.ledger.snapshot()
    for seed in range(4):
        kept.weights["w0"].product(inputs(0.5, seed))
    grown = kept.ledger.since(before)
    # (the record may still be read ahead once more, as a whole)
    assert grown["skipped_bytes"] == 4 * kept.units[0].nbytes
    assert grown["neuron_bytes"] == grown["neuron_hit_bytes"] > 0
    kept.close()


def test_what_a_failed_read_left_is_not_used(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    disk = Disk()
    write(path, ("exp", True, 0))
    counts = skewed(0)
    plain = opened(path, 0.0)
    kept = opened(path, 0.2, disk=disk, counts=NeuronCounts(TOKENS, {"w0": counts, "w1": counts}))
    for seed in range(30):
        x = draw(counts, seed)
        if seed % 3 == 2:
            disk.failures = 1
            everything = inputs(0.3, 1000 + seed)
            with pytest.raises(ReadError):
                kept.weights["w0"].product(everything)
        found, expected = (each.weights["w0"].product(x) for each in (kept, plain))
        assert torch.equal(found, expected)
    memory = memory_of(kept)
    assert memory._loose == sum(blocks.loose for blocks in memory._used.values())
    plain.close()
    kept.close()


def test_resident_memory_is_what_is_said(tmp_path: Path) -> None:
    """The mapping is as long as the record, and takes the memory of its blocks alone."""
    path = tmp_path / "w.safetensors"
    write(path, ("exp", False, 0), count=1)
    kept = opened(path, 0.1)
    kept.weights["w0"].product(inputs(0.01, 1))
    kept.weights["w0"].product(inputs(0.01, 2))
    (blocks,) = memory_of(kept)._used.values()
    # a kernel that loads a whole register may touch the page behind, which is one for all then
    pages = blocks.array.nbytes // mmap.PAGESIZE
    with open("/proc/self/pagemap", "rb") as file:  # noqa: PTH123
        file.seek(8 * (blocks.array.ctypes.data // mmap.PAGESIZE))
        entries = np.frombuffer(file.read(8 * pages), np.uint64)
    taken = np.flatnonzero(entries >> np.uint64(62))
    there = np.repeat(blocks.there, ALIGN)[:: mmap.PAGESIZE]
    assert there[taken].sum() == there.sum()
    assert len(taken) < 1.3 * there.sum()
    assert np.count_nonzero(blocks.there) < 0.5 * len(blocks.there)
    kept.close()


def test_refusals(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    write(path, ("raw", None, 0), count=1)
    with pytest.raises(ConfigError, match="what is kept of unit w0"):
        opened(path, 1.5)
    assert neuron_counts.counted([]) is None


@given(st.lists(st.booleans(), max_size=40))
def test_runs(blocks: list[bool]) -> None:
    found = np.zeros(len(blocks), dtype=bool)
    for first, last in runs(np.array(blocks, dtype=bool)):
        assert first < last
        found[first:last] = True
    assert found.tolist() == blocks


@pytest.mark.parametrize("page", [1, 4, 16])
@settings(max_examples=30)
@given(data=st.data())
def test_on_systems_with_larger_pages(page: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(1, 70))
    chances = np.array(data.draw(st.lists(st.floats(0, 1), min_size=count, max_size=count)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(neuron_blocks, "PAGE", page)
        room = data.draw(st.integers(0, 80)) * ALIGN
        kept = busiest(chances, room)
        assert len(kept) == count
        assert np.array_equal(kept, whole_pages(kept))
        assert -(-int(np.count_nonzero(kept)) // page) * page * ALIGN <= room + page * ALIGN
        out = whole_pages(chances > 0.5)
        assert (out >= (chances > 0.5)).all()
        assert all(first % page == 0 for first, _ in runs(out))
