"""Models whose second matrices are stored by neuron: the same bits, and zeros that are skipped."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import endor
from endor.hf import device_map as places
from endor.packing import pack_checkpoint
from endor.planning import Placement

from ..support.fake_device import FakeDevice
from .conftest import config_of, prompt


def saved(path: Path, kind: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """Write a random model, most of whose neurons are zero, and return it."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config_of(kind, **changes), dtype=dtype).eval()
    with torch.no_grad():
        for name, bias in model.named_parameters():
            if name.endswith("fc1.bias"):
                bias.fill_(-1.5)
    model.save_pretrained(path / "dense")
    return model


CASES = [
    ("opt", {}),
    ("opt", {"ffn_dim": 128, "hidden_size": 128, "word_embed_proj_dim": 128}),
    ("llama", {"hidden_act": "relu"}),
    ("llama", {"hidden_act": "relu2", "mlp_bias": True}),
]


@pytest.mark.parametrize(("kind", "changes"), CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tier", ["resident", "disk", "dense"])
@pytest.mark.parametrize("bundled", [False, True])
def test_the_model_is_the_same(
    tmp_path: Path,
    kind: str,
    changes: dict[str, Any],
    dtype: torch.dtype,
    tier: Any,
    bundled: bool,
) -> None:
    dense = saved(tmp_path, kind, dtype, **changes)
    dense_path, packed = tmp_path / "dense", tmp_path / "packed"
    pack_checkpoint(dense_path, packed, neurons=True, bundle_neurons=bundled)
    exact = endor.load_model(tmp_path / "packed", exact=True)
    turned = [
        name
        for layout in exact.endor.layouts
        for name, entry in layout.tensors.items()
        if entry.spec.transposed
    ]
    assert len(turned) == 3
    assert not exact.endor.unpacked
    tiers = dict.fromkeys((unit.name for unit in exact.endor.units), tier)
    largest = max(unit.nbytes for unit in exact.endor.units)
    placement = Placement(tiers, 0 if tier == "resident" else 2 * largest)
    exact = endor.load_model(tmp_path / "packed", exact=True, placement=placement)
    fast = endor.load_model(tmp_path / "packed", exact=False, placement=placement)
    with torch.no_grad():
        for ids in (prompt(), prompt(batch=1, length=1), prompt(batch=1, length=1)):
            expected = dense(ids).logits
            assert torch.equal(exact(ids).logits, expected)
            found = fast(ids).logits
            bound = 2e-5 if dtype == torch.float32 else 0.05
            assert (found - expected).abs().max() <= bound * expected.abs().max()
            assert torch.equal(found.argmax(-1), expected.argmax(-1)) or dtype != torch.float32
    for model in (exact, fast):
        model.endor.close()


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("bundled", [False, True])
def test_on_a_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exact: bool, bundled: bool
) -> None:
    """The device expands what is stored by neuron: the bits of the dense model."""
    dense = saved(tmp_path, "opt", torch.bfloat16)
    dense_path, packed = tmp_path / "dense", tmp_path / "packed"
    pack_checkpoint(dense_path, packed, neurons=True, bundle_neurons=bundled)
    monkeypatch.setattr(places, "open_device", lambda name: FakeDevice(total_bytes=1 << 30))
    monkeypatch.setattr(places, "refuse", lambda device: None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    model = endor.load_model(
        tmp_path / "packed", device="cuda:0", context=64, prompt=16, exact=exact
    )
    ids = prompt()
    with torch.no_grad():
        for _ in range(2):
            assert torch.equal(model(ids).logits, dense(ids).logits)
    for mover in model.endor.movers:
        assert mover.device.errors == []
    model.endor.close()
