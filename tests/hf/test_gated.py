"""Gated blocks behind ReLU: rows of the second factor that meet a zero are not multiplied."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

import endor
from endor.hf.gated import skip_gated
from endor.hf.linear import EndorLinear
from endor.packing import pack_checkpoint
from endor.planning import Placement

from .conftest import config_of, prompt


def packed(path: Path, act: str, dtype: torch.dtype, tier: Any = "resident", **changes: Any) -> Any:
    """Return a packed gated model whose products need not be exact."""
    torch.manual_seed(0)
    config = config_of("llama", hidden_act=act, **changes)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    with torch.no_grad():
        for name, bias in model.named_parameters():
            if "mlp" in name and name.endswith("bias"):
                bias.normal_()
    model.save_pretrained(path / "dense")
    pack_checkpoint(path / "dense", path / "packed")
    return load(path / "packed", tier)


def load(path: Path, tier: Any = "resident", *, exact: bool = False) -> Any:
    units = endor.load_model(path, exact=True).endor.units
    tiers = dict.fromkeys((unit.name for unit in units), tier)
    placement = Placement(tiers, 4 * max(unit.nbytes for unit in units))
    return endor.load_model(path, exact=exact, placement=placement)


def ups(model: Any) -> list[EndorLinear]:
    return [layer.mlp.up_proj for layer in model.model.layers]


def plain_logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Return what the model says where all rows are multiplied."""
    choices = [up.choice for up in ups(model)]
    for up in ups(model):
        up.choice = None
    try:
        return model(ids).logits
    finally:
        for up, choice in zip(ups(model), choices, strict=True):
            up.choice = choice


@pytest.mark.parametrize("act", ["relu", "relu2", "relu6"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tier", ["resident", "disk"])
@torch.no_grad()
def test_the_model_is_the_same(tmp_path: Path, act: str, dtype: torch.dtype, tier: str) -> None:
    model = packed(tmp_path, act, dtype, tier, mlp_bias=act == "relu2")
    for ids in (prompt(batch=1, length=1), prompt(batch=2, length=2), prompt()):
        expected = plain_logits(model, ids)
        model.endor.ledger.clear()
        assert torch.equal(model(ids).logits, expected)
        few = ids.numel() == 1  # of several, some token needs nearly every row
        counters = model.endor.ledger.counters
        assert (0 < counters.chosen_rows < counters.rows) == few
    model.endor.close()


@pytest.mark.parametrize(("act", "exact"), [("silu", False), ("gelu", False), ("relu", True)])
def test_nothing_is_skipped(tmp_path: Path, act: str, exact: bool) -> None:
    model = packed(tmp_path, act, torch.float32)
    if exact:
        model = load(tmp_path / "packed", exact=True)
    assert [up.choice for up in ups(model)] == [None] * 3
    model.endor.close()


@torch.no_grad()
def test_an_adapter_on_the_gate(tmp_path: Path) -> None:
    """What counts is what the activation gave, whoever made its input."""
    model = packed(tmp_path, "relu", torch.float32)

    class Adapter(nn.Module):
        def __init__(self, base: nn.Module) -> None:
            super().__init__()
            self.base = base

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return -self.base(x)

    for layer in model.model.layers:
        layer.mlp.gate_proj = Adapter(layer.mlp.gate_proj)
    ids = prompt(batch=1, length=1)
    expected = plain_logits(model, ids)
    model.endor.ledger.clear()
    assert torch.equal(model(ids).logits, expected)
    assert model.endor.ledger.counters.chosen_rows > 0
    model.endor.close()


@torch.no_grad()
def test_a_call_of_the_matrix_alone_takes_all_rows(tmp_path: Path) -> None:
    model = packed(tmp_path, "relu", torch.float32)
    model(prompt(batch=1, length=1))
    x = torch.randn(1, 1, 64)
    for up in ups(model):
        assert bool((up(x) != 0).all())
    model.endor.close()


@torch.no_grad()
def test_after_an_error_nothing_is_remembered(tmp_path: Path) -> None:
    model = packed(tmp_path, "relu", torch.float32)
    mlp, x = model.model.layers[0].mlp, torch.randn(1, 1, 64)

    def broken(input: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("no")

    mlp.up_proj.__dict__["forward"] = broken
    with pytest.raises(RuntimeError):
        mlp(x)
    del mlp.up_proj.__dict__["forward"]
    assert bool((mlp.up_proj(x) != 0).all())
    model.endor.close()


@torch.no_grad()
def test_a_copy_watches_its_own_blocks(tmp_path: Path) -> None:
    model = packed(tmp_path, "relu", torch.float32)
    other = copy.deepcopy(model)
    assert ups(other)[0].choice is not ups(model)[0].choice
    ids = prompt(batch=1, length=1)
    expected = plain_logits(model, ids)
    model.endor.ledger.clear()
    assert torch.equal(other(ids).logits, expected)
    assert model.endor.ledger.counters.chosen_rows > 0
    model.endor.close()


@torch.no_grad()
@pytest.mark.parametrize("kind", ["other factor", "both used", "twice", "sum"])
def test_blocks_of_other_code_are_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Names say nothing: what a block does is tried."""
    model = packed(tmp_path, "relu", torch.float32)
    mlp = type(model.model.layers[0].mlp)
    forwards = {
        "other factor": lambda self, x: self.down_proj(
            self.gate_proj(x) * self.act_fn(self.up_proj(x))
        ),
        "both used": lambda self, x: (
            self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
            + self.down_proj(self.up_proj(x))
        ),
        "twice": lambda self, x: (
            2 * self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
        ),
        "sum": lambda self, x: self.down_proj(self.act_fn(self.gate_proj(x)) + self.up_proj(x)),
    }
    monkeypatch.setattr(mlp, "forward", forwards[kind])
    for up in ups(model):
        up.choice = None
    assert skip_gated(model) == 0
    model.endor.close()


@torch.no_grad()
def test_a_compiled_model_takes_all_rows(tmp_path: Path) -> None:
    model = packed(tmp_path, "relu", torch.float32)
    ids = prompt(batch=1, length=1)
    expected = plain_logits(model, ids)
    compiled = torch.compile(model, backend="eager")
    model.endor.ledger.clear()
    assert torch.equal(compiled(ids).logits, expected)
    assert model.endor.ledger.counters.chosen_rows == 0
    model.endor.close()
