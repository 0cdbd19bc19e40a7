"""A model is sketched from its config alone, as packing it would turn out."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

import endor
from endor.errors import ConfigError
from endor.hf.planned import plan_checkpoint
from endor.hf.sketch import plan_sketch, sketch
from endor.models.outline import outline
from endor.planning.catalogue import described
from endor.planning.sketch import method

from .conftest import config_of


@pytest.mark.parametrize("kind", ["llama", "opt", "mixtral"])
def test_a_sketch_has_what_packing_packs(kind, tmp_path):
    config = config_of(kind)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "dense")
    endor.pack_checkpoint(tmp_path / "dense", tmp_path / "packed")
    packed = outline(tmp_path / "packed")
    found = sketch(tmp_path / "dense" / "config.json")
    assert found.name == packed.name
    assert found.parameters == sum(parameter.numel() for parameter in model.parameters())
    numel = sum(
        unit.layout.tensors[name].spec.numel for unit in packed.units for name in unit.tensors
    )
    assert sum(matrix.numel for matrix in found.matrices) == numel > 0
    assert found.shape.expert_use == packed.shape.expert_use
    assert found.shape.kv_bytes_per_token == packed.shape.kv_bytes_per_token


def test_a_packed_checkpoint_is_planned_for_another_machine(tmp_path):
    model = AutoModelForCausalLM.from_config(config_of("llama"), dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "dense")
    endor.pack_checkpoint(tmp_path / "dense", tmp_path / "packed")
    planned = plan_checkpoint(tmp_path / "packed", target=described("rtx4090"))
    assert planned.plan.vram_bytes == described("rtx4090").vram_bytes
    assert planned.machine.link.name == "RTX 4090"
    assert not planned.machine.measured


def test_budgets_of_the_caller_win_over_the_tables(tmp_path):
    config = config_of("llama")
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(tmp_path)
    found = sketch(tmp_path)
    planned = plan_sketch(found, method(bits=4), target=described("h100"), ram="1GiB", vram="2GiB")
    assert planned.plan.ram_bytes == 1 << 30
    assert planned.plan.vram_bytes == 2 << 30


def test_what_is_no_model_is_said(tmp_path):
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"config\.json"):
        sketch(tmp_path / "other.json")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "nothing-known"}))
    with pytest.raises(ConfigError):
        sketch(tmp_path)
