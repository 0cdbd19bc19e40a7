"""Busy neurons on a simulated device, the others on the host: the processor's products."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from endor import codecs, kernels
from endor.checkpoint.neuron_counts import NeuronCounts
from endor.codecs import DTYPES, Encoded
from endor.errors import BackendError, ChecksumError, ConfigError
from endor.offload import Store, neuron_beside, store
from endor.offload.neuron_beside import NeuronBesideWeight, busy_part, columns, flattened
from endor.planning import Part, Placement, WeightSpec, collect_units
from endor.planning.products import Products
from endor.storage import FileLayout, open_reader

from ..support.fake_device import FakeDevice
from .test_neuron_blocks import TOKENS, draw, skewed
from .test_neuron_reads import HIDDEN, NEURONS, How, write

HOW: list[How] = [("raw", None, 0), ("exp", True, 0), ("exp", False, 0)]


def opened(
    path: Path,
    shares: dict[str, float],
    *,
    device: FakeDevice | None = None,
    counts: NeuronCounts | None = None,
    host_share: float = 1.0,
) -> Store:
    """Return a store in tier `host`, so much of each matrix also on the device."""
    layout = FileLayout.read(path)
    specs = [
        WeightSpec(name, (HIDDEN, NEURONS), (Part(name, 0, HIDDEN * NEURONS, 0),), name)
        for name in layout.tensors
    ]
    units = collect_units([layout], specs)
    tiers = dict.fromkeys((unit.name for unit in units), "host" if device else "resident")
    kept = {u.name: int(shares[u.name] * u.nbytes) for u in units if shares.get(u.name)}
    hosted = dict.fromkeys(tiers, host_share)
    placement = Placement(tiers, 0, 2 if device else 0, hosted, kept_bytes=kept)  # type: ignore[arg-type]
    pairs = [(spec, torch.bfloat16) for spec in specs]
    products = Products(packed_rows=dict.fromkeys(tiers, 8))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store, "counted", lambda layouts: counts)
        return Store.open(
            [layout], units, pairs, placement, open_reader(), device=device, products=products
        )


def assert_close(found: torch.Tensor, x: torch.Tensor, matrix: np.ndarray) -> None:
    """Assert that a product lies within tolerance; a part may be torch's, rounded to bf16."""
    dense = torch.from_numpy(matrix.view(np.int16)).view(torch.bfloat16).double()
    wide = x.double()
    size = wide.abs() @ dense.abs().T
    bound = size * 2.0**-24 * (NEURONS + 1) + 2.0**-8 * size
    assert ((found.double() - wide @ dense.T).abs() <= bound).all()


@pytest.mark.parametrize("how", HOW)
@settings(max_examples=5, deadline=None)
@given(
    shares=st.tuples(*[st.sampled_from([0.0, 0.02, 0.1, 0.5, 1.0])] * 2),
    known=st.booleans(),
    steps=st.lists(st.tuples(st.integers(0, 99), st.integers(1, 4)), min_size=1, max_size=5),
    latency=st.sampled_from([0.0, 1e-5, 1e-2]),
)
def test_any_split_gives_the_processors_product(
    tmp_path_factory: pytest.TempPathFactory,
    how: How,
    shares: tuple[float, float],
    known: bool,
    steps: list[tuple[int, int]],
    latency: float,
) -> None:
    path = tmp_path_factory.mktemp("beside") / "w.safetensors"
    matrices = write(path, how)
    counts = {f"w{at}": skewed(at) for at in range(2)}
    device = FakeDevice(bytes_per_s=1e8, latency_s=lambda: latency)
    split = opened(
        path,
        {f"w{at}": share for at, share in enumerate(shares)},
        device=device,
        counts=NeuronCounts(TOKENS, counts) if known else None,
    )
    plain = opened(path, {})
    for seed, batch in steps:
        for at, matrix in enumerate(matrices):
            x = draw(counts[f"w{at}"], seed, batch)
            found = split.weights[f"w{at}"].product(x)
            device.drain()
            assert_close(found, x, matrix)
            if not shares[at]:
                expected = plain.weights[f"w{at}"].product(x)
                assert torch.equal(found.view(torch.int32), expected.view(torch.int32))
    counters = split.ledger.counters
    assert 0 <= counters.device_neurons <= counters.active_neurons
    for at, share in enumerate(shares):
        weight = split.weights[f"w{at}"]
        assert isinstance(weight, NeuronBesideWeight) == (share > 0)
        if isinstance(weight, NeuronBesideWeight):
            assert weight.hot_nbytes <= share * split.units[at].nbytes
    assert device.errors == []
    split.close()
    plain.close()


def test_busy_neurons_are_multiplied_on_the_device(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    write(path, ("exp", False, 0), count=1)
    counts = skewed(0)
    shares = {}
    for known in (True, False):
        device = FakeDevice(bytes_per_s=1e9)
        found = NeuronCounts(TOKENS, {"w0": counts}) if known else None
        split = opened(path, {"w0": 0.3}, device=device, counts=found)
        split.preload()
        for seed in range(10):
            split.weights["w0"].product(draw(counts, seed))
        device.drain()
        counters = split.ledger.counters
        assert counters.neurons == 10 * NEURONS
        shares[known] = counters.device_neurons / counters.active_neurons
        assert split.report()["busy_neurons_bytes"] > 0.2 * split.units[0].nbytes
        assert split.held_nbytes > split.movers[0].held_nbytes
        split.close()
    assert shares[True] > 0.7
    assert shares[False] < 0.4


def test_nothing_comes_up_where_only_busy_neurons_are_active(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    (matrix,) = write(path, ("raw", None, 0), count=1)
    counts = skewed(0)
    device = FakeDevice(bytes_per_s=1e9)
    split = opened(path, {"w0": 0.5}, device=device, counts=NeuronCounts(TOKENS, {"w0": counts}))
    x = torch.zeros(2, NEURONS, dtype=torch.bfloat16)
    x[:, np.argsort(-counts)[:50].copy()] = 1.5
    found = split.weights["w0"].product(x)
    device.drain()
    assert_close(found, x, matrix)
    assert split.ledger.counters.host_products == 0
    assert not split.weights["w0"].product(torch.zeros_like(x)).any()
    split.close()
    with pytest.raises(BackendError, match="closed"):
        split.weights["w0"].product(x)


def test_many_rows_take_the_whole(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    (matrix,) = write(path, ("exp", True, 0), count=1)
    device = FakeDevice(bytes_per_s=1e9)
    split = opened(path, {"w0": 0.3}, device=device)
    found = split.weights["w0"].dense()
    device.drain()
    assert np.array_equal(found.view(torch.int16).numpy().view(np.uint16), matrix)
    split.close()


def test_a_damaged_record_is_found_before_anything_is_enqueued(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    write(path, ("raw", None, 0), count=1)
    record = FileLayout.read(path).records["w0"]
    raw = bytearray(path.read_bytes())
    raw[record.offset + 5000] ^= 1
    path.write_bytes(raw)
    device = FakeDevice(bytes_per_s=1e9)
    split = opened(path, {"w0": 0.3}, device=device)
    with pytest.raises(ChecksumError):
        split.weights["w0"].product(draw(skewed(0), 1))
    assert split.shares[0].hot_nbytes == 0
    split.close()


def test_no_memory_on_the_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error, nothing half made; and the next attempt makes it."""
    path = tmp_path / "w.safetensors"
    (matrix,) = write(path, ("exp", False, 0), count=1)
    device = FakeDevice(bytes_per_s=1e9)
    split = opened(path, {"w0": 0.9}, device=device)

    def refuse(nbytes: int) -> torch.Tensor:
        raise BackendError("no device memory")

    with monkeypatch.context() as patch:
        patch.setattr(device, "allocate", refuse)
        with pytest.raises(BackendError, match="no device memory"):
            split.preload()
    assert split.shares[0].hot_nbytes == 0
    x = draw(skewed(0), 1)
    found = split.weights["w0"].product(x)
    device.drain()
    assert_close(found, x, matrix)
    assert split.shares[0].hot_nbytes > 0
    split.close()


def test_shared_out_by_neuron_or_by_row(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    write(path, ("raw", None, 0), count=1)
    with pytest.raises(ConfigError, match="by neuron, and cannot be by row"):
        opened(path, {"w0": 0.5}, device=FakeDevice(bytes_per_s=1e9), host_share=0.5)


@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(1, 70),
    chosen=st.sets(st.integers(0, 149), min_size=1, max_size=150),
    codec=st.sampled_from(["raw", "exp"]),
    kept=st.floats(0, 1.2),
)
def test_columns_keep_their_bits(rows: int, chosen: set[int], codec: str, kept: float) -> None:
    rng = np.random.default_rng(rows)
    bits = rng.integers(0, 1 << 16, (rows, 150), dtype=np.uint16)
    bits[rng.random(bits.shape) < 0.5] = 0
    stored = codecs.encode(np.ascontiguousarray(bits.T), DTYPES["BF16"], codec=codec)  # type: ignore[arg-type]
    made = Encoded(stored.spec.turned(), stored.arrays)
    picks = np.array(sorted(chosen))
    assert np.array_equal(columns(made, picks), bits[:, picks])
    share = rng.random(150) * (rng.random(150) < 0.9)
    found = busy_part(made, share, int(kept * made.spec.nbytes))
    if found is None:
        return
    busy, packed = found
    assert len(busy) % neuron_beside.STEP == 0
    assert share[busy].min() >= np.sort(share)[::-1][len(busy) - 1]
    out = np.empty(packed.spec.numel, dtype=np.uint16)
    assert np.array_equal(kernels.decode(packed, out).reshape(rows, -1), bits[:, busy])
    data, places = flattened(packed)
    assert data.nbytes <= kept * made.spec.nbytes
    for suffix, at in places.items():
        array = packed.arrays[suffix]
        assert at % 256 == 0
        assert data[at : at + array.nbytes].tobytes() == np.ascontiguousarray(array).tobytes()
