"""Whole models with counted neurons: busy ones in memory or on a device, the model's logits."""

from pathlib import Path
from typing import Any

import pytest
import torch

import endor
from endor.hf import device_map as places
from endor.hf import placing
from endor.hf.planned import plan_checkpoint
from endor.offload import neuron_parts, neuron_reads
from endor.offload.neuron_parts import Prices
from endor.packing import pack_checkpoint
from endor.planning import Placement
from endor.planning.products import Products
from endor.pruning.contract import PruneOptions

from ..pruning.conftest import save_tokenizer
from ..support.fake_device import FakeDevice
from .conftest import prompt
from .test_neurons import saved

SIZES = {"vocab_size": 259, "hidden_size": 256, "word_embed_proj_dim": 256, "ffn_dim": 2048}


@pytest.fixture
def packed(tmp_path: Path) -> tuple[Any, Path]:
    """A dense model, and where it is packed with the counts of its neurons."""
    dense = saved(tmp_path, "opt", torch.bfloat16, **SIZES)
    with torch.no_grad():
        for layer in dense.model.decoder.layers:
            layer.fc1.bias.copy_(torch.linspace(0.2, -8.0, 2048))
    dense.save_pretrained(tmp_path / "dense")
    save_tokenizer(tmp_path / "dense")
    (tmp_path / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 60)
    how = PruneOptions(method="none", calibration=(tmp_path / "text.txt",), samples=8, seq_len=64)
    pack_checkpoint(tmp_path / "dense", tmp_path / "packed", neurons=True, count=True, prune=how)
    return dense, tmp_path / "packed"


def placed(model: Any, tier: str, share: float, **options: Any) -> Placement:
    """Return a placement of all units in `tier`, so much of the matrices by neuron kept."""
    units = model.endor.units
    by_neuron = [
        unit
        for unit in units
        if any(unit.layout.tensors[name].spec.transposed for name in unit.tensors)
    ]
    assert len(by_neuron) == 3
    kept = {unit.name: int(share * unit.nbytes) for unit in by_neuron} if share else {}
    tiers: Any = dict.fromkeys((unit.name for unit in units), tier)
    return Placement(tiers, 3 * max(unit.nbytes for unit in units), kept_bytes=kept, **options)


def steps(model: Any, count: int = 6) -> torch.Tensor:
    """Return the logits of single tokens, one after the other."""
    ids = torch.randint(1, 211, (count, 1, 1), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        return torch.cat([model(each).logits for each in ids])


def test_from_disk(packed: tuple[Any, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    dense, path = packed
    # whatever this machine is faster with
    monkeypatch.setattr(placing, "choose", lambda costs, machine: Products())
    monkeypatch.setattr(neuron_parts, "WHOLE", 2.0)
    monkeypatch.setattr(neuron_reads, "prices", lambda path: Prices(4 << 10, 1.0))
    first = endor.load_model(path, exact=False)
    first.endor.close()
    found = {}
    for share in (0.0, 0.4):
        placement = placed(first, "disk", share)
        model = endor.load_model(path, exact=False, placement=placement)
        steps(model, 2)
        model.endor.ledger.clear()
        found[share] = steps(model), model.endor.ledger.counters.read_bytes
        counters = model.endor.ledger.counters
        assert counters.skipped_bytes > 0
        assert (counters.neuron_hit_bytes > 0) or not share
        model.endor.close()
    (plain, read), (kept, less) = found[0.0], found[0.4]
    assert torch.equal(plain.view(torch.int16), kept.view(torch.int16))
    assert less < read
    expected = steps(dense)
    assert (kept - expected).abs().max() <= 0.05 * expected.abs().max()


def test_beside_a_device(packed: tuple[Any, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    dense, path = packed
    device = FakeDevice(total_bytes=1 << 30)
    monkeypatch.setattr(places, "open_device", lambda name: device)
    monkeypatch.setattr(places, "refuse", lambda device: None)
    first = endor.load_model(path, exact=False)
    first.endor.close()
    placement = placed(first, "host", 0.3, slots=2)
    model = endor.load_model(path, device="cuda:0", exact=False, placement=placement)
    expected, found = steps(dense), steps(model)
    assert (found - expected).abs().max() <= 0.05 * expected.abs().max()
    counters = model.endor.ledger.counters
    assert 0 < counters.device_neurons < counters.active_neurons
    assert counters.host_products > 0
    with torch.no_grad():  # many rows take the whole, on the device
        many = prompt(batch=2, length=20)
        wanted = dense(many).logits
        assert (model(many).logits - wanted).abs().max() <= 0.05 * wanted.abs().max()
    report = model.endor.report()
    assert report["busy_neurons_bytes"] > 0
    assert device.errors == []
    model.endor.close()


def test_a_plan_knows_the_counts(
    packed: tuple[Any, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Damaged counts are refused where a plan is made, and where a model is loaded."""
    _, path = packed
    found = plan_checkpoint(path, exact=False, context=64, prompt=16)
    assert found.outline.counts is not None
    assert len(found.outline.counts.active) == 3
    counts = path / "endor.neurons.safetensors"
    counts.write_bytes(counts.read_bytes()[:-1] + b"\x7f")
    for refused in (plan_checkpoint, endor.load_model):
        with pytest.raises(endor.errors.EndorError, match=r"endor\.neurons\.safetensors"):
            refused(path, exact=False)
