"""Parts of matrices that are stored by neuron, read from disk: the same sums, fewer bytes."""

import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from endor import codecs
from endor.codecs import DTYPES, CodecChoice, Encoded
from endor.errors import BackendError, EndorError, IntegrityError, ReadError, ShapeError
from endor.offload import Store, neuron_parts, neuron_passing, neuron_reads
from endor.offload.neuron_parts import Prices
from endor.offload.neuron_weight import NeuronWeight
from endor.planning import Part, Placement, WeightSpec, collect_units
from endor.planning.constants import Disk as Constants
from endor.planning.products import Products
from endor.storage import FileLayout, FileWriter, HostBuffer, header_capacity, open_reader
from endor.storage.scattered import read_spans

from ..support.packed_files import Disk

HIDDEN, NEURONS = 640, 1200
PRICES = neuron_reads.prices
How = tuple[CodecChoice, bool | None, int]
"""Codec, bitmap, and how many neurons are bundled; 0 for none."""

HOW: list[How] = [
    ("raw", None, 0),
    ("exp", True, 0),
    ("exp", False, 0),
    ("raw", None, 7),
    ("exp", True, 1),
    ("exp", False, 2),
]


@pytest.fixture(scope="module", autouse=True)
def _small() -> Iterator[None]:
    """Requests cost so little that parts of small records are worth reading."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(neuron_parts, "WHOLE", 0.8)
        patch.setattr(neuron_reads, "prices", lambda path: Prices(4 << 10, 1.0))
        yield


def elements(rows: int, cols: int, density: float, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    values = rng.standard_normal((rows, cols)) * 0.02
    values[rng.random((rows, cols)) >= density] = 0
    values[:, 5] *= 1e9  # patches
    single: np.ndarray = values.astype(np.float32).view(np.uint32) >> 16
    return single.astype(np.uint16)


def write(path: Path, how: How, *, count: int = 2, density: float = 0.5) -> list[np.ndarray]:
    """Write matrices `w0`, `w1`, ..., each stored by neuron in a record of its own."""
    matrices = [elements(HIDDEN, NEURONS, density, seed) for seed in range(count)]
    stored = {}
    for at, matrix in enumerate(matrices):
        bits = np.ascontiguousarray(matrix.T)
        made = codecs.encode(bits, DTYPES["BF16"], codec=how[0], bitmap=how[1])
        stored[f"w{at}"] = Encoded(made.spec.turned(), made.arrays)
        if how[2]:
            stored[f"w{at}"] = codecs.bundled.encode(bits, made.spec, how[2])
    plan = {name: {name: made.spec} for name, made in stored.items()}
    with FileWriter(path, header_capacity=header_capacity(plan)) as writer:
        for name, made in stored.items():
            with writer.record(name) as record:
                record.add(name, made)
    return matrices


def opened(
    path: Path, *, tier: str = "disk", disk: Disk | None = None, verify: bool = True
) -> Store:
    layout = FileLayout.read(path)
    specs = [
        WeightSpec(name, (HIDDEN, NEURONS), (Part(name, 0, HIDDEN * NEURONS, 0),), name)
        for name in layout.tensors
    ]
    units = collect_units([layout], specs)
    tiers = dict.fromkeys((unit.name for unit in units), tier)
    placement = Placement(tiers, 2 * max(unit.nbytes for unit in units))  # type: ignore[arg-type]
    reader = open_reader(preadv=disk) if disk else open_reader()
    pairs = [(spec, torch.bfloat16) for spec in specs]
    products = Products(packed_rows=dict.fromkeys(tiers, 8))
    return Store.open([layout], units, pairs, placement, reader, verify=verify, products=products)


def inputs(share: float, seed: int, batch: int = 1) -> torch.Tensor:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((batch, NEURONS)).astype(np.float32)
    x[:, rng.random(NEURONS) >= share] = 0
    return torch.from_numpy(x).bfloat16()


def assert_product(store: Store, name: str, matrix: np.ndarray, x: torch.Tensor) -> None:
    found = store.weights[name].product(x).double()
    dense = torch.from_numpy(matrix.view(np.int16)).view(torch.bfloat16).double()
    wide = x.double()
    bound = (wide.abs() @ dense.abs().T) * 2.0**-24 * (NEURONS + 1)
    assert ((found - wide @ dense.T).abs() <= bound).all()


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize(("verify", "passing"), [(True, False), (False, False), (True, True)])
@settings(max_examples=6, deadline=None)
@given(
    steps=st.lists(
        st.tuples(
            st.sampled_from([0.0, 0.001, 0.01, 0.03, 0.3, 1.0]),
            st.integers(0, 99),
            st.integers(1, 3),
            st.sampled_from(["product", "product", "product", "dense"]),
        ),
        min_size=1,
        max_size=8,
    )
)
def test_any_steps_give_the_sums_of_the_whole(
    tmp_path_factory: pytest.TempPathFactory,
    how: How,
    verify: bool,
    passing: bool,
    steps: list[tuple[float, int, int, str]],
) -> None:
    path = tmp_path_factory.mktemp("parts") / "w.safetensors"
    matrices = write(path, how)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(neuron_passing, "READ_SHARE", 2.0 if passing else 0.0)
        store = opened(path, verify=verify)
    reads = store.shares[0].reads
    assert reads is not None
    assert isinstance(reads._memory, neuron_passing.PassingMemory) == passing
    for share, seed, batch, what in steps:
        for at, matrix in enumerate(matrices):
            if what == "dense":
                found = store.weights[f"w{at}"].dense().view(torch.int16).numpy()
                assert np.array_equal(found.view(np.uint16), matrix)
            else:
                assert_product(store, f"w{at}", matrix, inputs(share, seed, batch))
    store.close()


@pytest.mark.parametrize("how", HOW)
def test_few_neurons_read_few_bytes(tmp_path: Path, how: How) -> None:
    path = tmp_path / "w.safetensors"
    matrices = write(path, how)
    store = opened(path)
    assert all(isinstance(w, NeuronWeight) for w in store.weights.values())
    whole = store.packed_nbytes
    for turn in range(2):  # read whole, and ahead once more
        for at, matrix in enumerate(matrices):
            assert_product(store, f"w{at}", matrix, inputs(0.005, at + turn))
    for turn in range(3):
        before = store.ledger.snapshot()
        for at, matrix in enumerate(matrices):
            assert_product(store, f"w{at}", matrix, inputs(0.005, 10 + turn + at))
        grown = store.ledger.since(before)
        assert 0 < grown["read_bytes"] < 0.8 * whole
        assert grown["read_bytes"] + grown["skipped_bytes"] == whole
        assert grown["neurons"] == 2 * NEURONS
        assert 0 < grown["active_neurons"] < 0.02 * 2 * NEURONS
    assert store.held_nbytes < 2 * whole + max(unit.nbytes for unit in store.units)
    store.close()
    with pytest.raises(BackendError, match="closed"):
        store.weights["w0"].product(inputs(0.005, 1))


def test_nothing_active_reads_nothing(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    write(path, ("exp", True, 0))
    store = opened(path)
    for _ in range(2):
        store.weights["w0"].product(inputs(0.01, 1))
    before = store.ledger.snapshot()
    assert not store.weights["w0"].product(inputs(0.0, 1)).any()
    # bytes read are no measure: what was asked for ahead may come now
    whole = next(unit.nbytes for unit in store.units if unit.name == "w0")
    assert store.ledger.since(before)["skipped_bytes"] == whole
    store.close()


def test_in_memory_nothing_is_read(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    matrices = write(path, ("exp", True, 0))
    store = opened(path, tier="resident")
    store.preload()
    before = store.ledger.snapshot()
    assert_product(store, "w1", matrices[1], inputs(0.05, 3))
    grown = store.ledger.since(before)
    assert (grown["read_bytes"], grown["neurons"]) == (0, NEURONS)
    store.close()


def test_a_block_that_changed_is_found(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    matrices = write(path, ("raw", None, 0))
    store = opened(path)
    x = inputs(0.005, 1)
    for _ in range(3):
        for at, matrix in enumerate(matrices):
            assert_product(store, f"w{at}", matrix, x)
    entry = FileLayout.read(path).tensors["w0"]
    record = FileLayout.read(path).records["w0"]
    values = next(array for array in entry.arrays if array.suffix == "values")
    raw = bytearray(path.read_bytes())
    for at in range(values.start, values.stop, 1000):
        raw[record.offset + at] ^= 1
    with path.open("r+b") as file:  # in place: a new file would be refused for that
        file.write(raw)
    with pytest.raises(IntegrityError, match="changed at offset"):
        store.weights["w0"].product(inputs(0.005, 2))
    assert_product(store, "w0", matrices[0], x)  # in memory since before
    store.close()


def test_an_error_of_the_disk_ends_there(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    disk = Disk()
    matrices = write(path, ("exp", True, 0))
    store = opened(path, disk=disk)
    for _ in range(3):
        for at, matrix in enumerate(matrices):
            assert_product(store, f"w{at}", matrix, inputs(0.005, 1))
    disk.failures = 1
    with pytest.raises(ReadError, match="failed"):
        store.weights["w0"].product(inputs(0.005, 2))
    assert_product(store, "w0", matrices[0], inputs(0.005, 2))
    disk.short = True
    assert_product(store, "w0", matrices[0], inputs(0.02, 3))
    store.close()


def test_threads_share_a_model(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    matrices = write(path, ("exp", True, 0))
    store = opened(path)
    errors: list[BaseException] = []

    def run(seed: int) -> None:
        try:
            for turn in range(12):
                at = (seed + turn) % 2
                share = (0.004, 0.3, 0.01)[turn % 3]
                assert_product(store, f"w{at}", matrices[at], inputs(share, 100 * seed + turn))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not errors
    store.close()


@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_spans_come_to_their_places(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("spans") / "w.safetensors"
    write(path, ("raw", None, 0), count=1)
    layout = FileLayout.read(path)
    record = layout.records["w0"]
    blocks = record.nbytes // 4096
    cuts = sorted(data.draw(st.sets(st.integers(0, blocks), max_size=20)))
    pairs = zip(cuts[::2], cuts[1::2], strict=False)
    spans = [(4096 * a, 4096 * b) for a, b in pairs]
    buffer = HostBuffer(record.nbytes)
    buffer.array[:] = 0xAA
    with open_reader(threads=data.draw(st.integers(1, 5))) as reader:
        stat = read_spans(reader, record, spans, buffer)
    expected = np.full(record.nbytes, 0xAA, dtype=np.uint8)
    raw = np.fromfile(path, np.uint8)[record.offset : record.offset + record.nbytes]
    for start, stop in spans:
        expected[start:stop] = raw[start:stop]
    assert np.array_equal(buffer.array, expected)
    assert stat.nbytes == sum(stop - start for start, stop in spans)


@pytest.mark.parametrize("spans", [[(1, 4096)], [(4096, 4096)], [(8192, 12288), (0, 4096)]])
def test_spans_that_are_none(tmp_path: Path, spans: list[tuple[int, int]]) -> None:
    path = tmp_path / "w.safetensors"
    write(path, ("raw", None, 0), count=1)
    record = FileLayout.read(path).records["w0"]
    reader = open_reader()
    with pytest.raises(ShapeError, match="ascending blocks"):
        read_spans(reader, record, spans, HostBuffer(record.nbytes))
    reader.close()
    with pytest.raises(EndorError, match="closed"):
        read_spans(reader, record, [(0, 4096)], HostBuffer(record.nbytes))


def test_a_request_has_its_price(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where parts would cost more than the whole, the whole is read, and ahead of its use."""
    path = tmp_path / "w.safetensors"
    matrices = write(path, ("exp", True, 0), count=3)
    monkeypatch.setattr(neuron_reads, "prices", lambda path: Prices(1 << 30, 1.0))
    store = opened(path)
    for turn in range(3):
        for at, matrix in enumerate(matrices):
            assert_product(store, f"w{at}", matrix, inputs(0.01, turn))
    counters = store.ledger.counters
    assert counters.skipped_bytes == 0
    assert counters.hits + counters.late > 3
    store.close()


@pytest.mark.parametrize(("request_us", "parts"), [(2.0, True), (1e6, False)])
def test_the_price_is_that_of_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request_us: float, parts: bool
) -> None:
    path = tmp_path / "w.safetensors"
    matrices = write(path, ("exp", True, 0), count=3)
    asked = []

    def known(path: Path) -> Constants:
        asked.append(path)
        return Constants(2.0, 2.0, 2.0, 0.1, True, request_us, scattered_gbps=0.5)

    monkeypatch.setattr(neuron_reads, "known_disk", known)
    monkeypatch.setattr(neuron_reads, "prices", PRICES)
    assert PRICES(path) == Prices(int(500 * request_us), 4.0)
    store = opened(path)
    for turn in range(3):
        for at, matrix in enumerate(matrices):
            assert_product(store, f"w{at}", matrix, inputs(0.005, turn))
    assert (store.ledger.counters.skipped_bytes > 0) == parts
    assert set(asked) == {path}
    store.close()


def test_parts_that_pass_through_are_read_for_each_use(tmp_path: Path) -> None:
    """Of more matrices than there is room for; with one, what was read stays."""
    path = tmp_path / "w.safetensors"
    matrices = write(path, ("exp", True, 1), count=8)
    store = opened(path)
    reads = store.shares[0].reads
    assert reads is not None
    assert isinstance(reads._memory, neuron_passing.PassingMemory)
    for turn in range(3):
        for at, matrix in enumerate(matrices):
            assert_product(store, f"w{at}", matrix, inputs(0.005, at + turn))
    before = store.ledger.snapshot()
    for _ in range(3):
        assert_product(store, "w3", matrices[3], inputs(0.005, 3))
    assert store.ledger.since(before)["reads"] == 1
    assert reads.nbytes < 2 * max(unit.nbytes for unit in store.units)
    store.close()
