"""Fused experts: only routed ones move, from whatever layout the checkpoint has."""

import gc
import weakref

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

import endor
from endor.errors import CheckpointError, ConfigError
from endor.hf import EndorExperts
from endor.hf.experts import eager_forward
from endor.planning import Placement

from .conftest import Pair, all_packed, least, prompt


def experts_of(model):
    return [module for module in model.modules() if isinstance(module, EndorExperts)]


def test_it_is_still_the_architectures_class(make_pair):
    pair = make_pair("mixtral")
    model = endor.load_model(pair.packed)
    module = experts_of(model)[0]
    assert isinstance(module, type(pair.dense.model.layers[0].mlp.experts))
    assert list(module.parameters()) == []
    assert module.gate_up_proj.shape == (6, 192, 64)
    assert module.gate_up_proj.dtype == torch.bfloat16
    assert len(module.down_proj) == 6


def test_one_token_uses_only_its_experts(make_pair):
    pair = make_pair("mixtral")
    whole = endor.load_model(pair.packed)
    model = endor.load_model(pair.packed, placement=all_packed(whole))
    model.endor.preload()
    model.endor.ledger.clear()
    pair.logits(model, torch.tensor([[5]]))
    names = [event.name for event in model.endor.ledger.events if ".experts." in event.name]
    for layer in range(3):
        used = [name for name in names if f"layers.{layer}." in name]
        assert len(used) == 4, used  # gate_up_proj and down_proj of two experts
    assert len(set(names)) == len(names)


def test_streamed_experts_are_read_once_for_both_products(make_pair):
    pair = make_pair("mixtral")
    all_in = endor.load_model(pair.packed)
    largest = max(unit.nbytes for unit in all_in.endor.units)
    model = endor.load_model(pair.packed, ram=least(all_in) + largest)
    pair.check(model)
    model.endor.ledger.clear()
    pair.logits(model, torch.tensor([[5]]))
    events = model.endor.ledger.events
    read = [event.name for event in events if event.kind == "read" and "experts" in event.name]
    assert len(read) <= 6, read


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
def test_a_cache_of_experts_changes_no_bit(make_pair, kind):
    """Half of the experts fit: some are read, some guessed, and the logits stay what they were."""
    pair = make_pair(kind)
    whole = endor.load_model(pair.packed).endor
    routed = [unit for unit in whole.units if not unit.scheduled]
    tiers = dict.fromkeys((unit.name for unit in whole.units), "resident")
    tiers |= dict.fromkeys((unit.name for unit in routed[::2]), "disk")
    largest = max(unit.nbytes for unit in routed)
    model = endor.load_model(pair.packed, placement=Placement(tiers, 2 * largest))
    pair.check(model)
    ids = prompt(2, 5)
    text = model.generate(ids, max_new_tokens=12, do_sample=False)
    assert torch.equal(text, pair.dense.generate(ids, max_new_tokens=12, do_sample=False))
    counters = model.endor.ledger.counters
    assert 0 < counters.expert_hits < counters.expert_uses
    assert 0 < counters.right_guesses <= counters.guessed_uses < counters.expert_uses
    assert counters.warm_used + counters.warm_wasted <= counters.warm_reads


def test_guesses_do_not_show_in_recorded_router_logits(make_pair):
    pair = make_pair("mixtral")
    whole = endor.load_model(pair.packed).endor
    tiers = dict.fromkeys((unit.name for unit in whole.units), "disk")
    largest = max(unit.nbytes for unit in whole.units)
    model = endor.load_model(pair.packed, placement=Placement(tiers, 8 * largest))
    ids = prompt(1, 5)
    with torch.no_grad():
        expected = pair.dense(ids, output_router_logits=True).router_logits
        found = model(ids, output_router_logits=True).router_logits
    assert len(found) == len(expected) == 3
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    assert model.endor.ledger.counters.guesses > 0


def test_a_model_with_guesses_is_freed_at_once(make_pair):
    model = endor.load_model(make_pair("mixtral").packed)
    gone = weakref.ref(model.model.layers[1].mlp.gate)
    gc.disable()
    try:
        del model
        assert gone() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
def test_fast_products(make_pair, kind):
    pair = make_pair(kind)
    model = endor.load_model(pair.packed, exact=False)
    one = prompt(1, 1)
    exact, fast = pair.logits(pair.dense, one).float(), pair.logits(model, one).float()
    products = [e.name for e in model.endor.ledger.events if e.kind == "product"]
    assert any("experts" in name for name in products)
    assert (exact - fast).abs().max() <= 0.05 * exact.abs().max()


def test_gradients_pass_through(make_pair):
    pair = make_pair("mixtral")
    model = endor.load_model(pair.packed)
    ids = prompt(1, 6)
    grads = []
    for each in (model, pair.dense):
        each.zero_grad()
        each(ids, labels=ids).loss.backward()
        grads.append(each.model.embed_tokens.weight.grad.float())
    pair.dense.zero_grad()
    assert (grads[0] - grads[1]).abs().max() <= 0.02 * grads[1].abs().max()


def fused_source(pair, folder):
    """Write the checkpoint of `pair` with its experts as 3-D tensors."""
    state = {name: tensor.contiguous() for name, tensor in pair.dense.state_dict().items()}
    folder.mkdir()
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    pair.dense.config.save_pretrained(folder)
    return state


def test_experts_stored_as_one_tensor(make_pair, tmp_path):
    pair = make_pair("mixtral")
    state = fused_source(pair, tmp_path / "source")
    assert state["model.layers.0.mlp.experts.gate_up_proj"].dim() == 3
    endor.pack_checkpoint(tmp_path / "source", tmp_path / "packed", include=["*experts*"])
    fused = Pair(tmp_path / "packed", pair.dense_dir, pair.dense)
    model = endor.load_model(fused.packed)
    stored = [name for unit in model.endor.units for name in unit.tensors if "experts" in name]
    assert stored.count("model.layers.0.mlp.experts.gate_up_proj") == 1
    fused.check(model)
    fused.check(endor.load_model(fused.packed, ram=least(model)))


def test_some_experts_stored_dense(make_pair, tmp_path):
    """The packer leaves alone what does not shrink; an experts module may then be mixed."""
    pair = make_pair("mixtral")
    endor.pack_checkpoint(
        pair.dense_dir, tmp_path / "packed", exclude=["*experts.3.w1*", "*experts.5.w2*"]
    )
    mixed = Pair(tmp_path / "packed", pair.dense_dir, pair.dense)
    mixed.check(endor.load_model(mixed.packed))


def test_a_missing_expert_is_refused(make_pair, tmp_path):
    pair = make_pair("mixtral")
    source = tmp_path / "source"
    source.mkdir()
    file = next(pair.dense_dir.glob("*.safetensors"))
    state = load_file(file)
    lost = "model.layers.1.block_sparse_moe.experts.4.w1.weight"
    del state[lost]
    save_file(state, source / "model.safetensors", metadata={"format": "pt"})
    pair.dense.config.save_pretrained(source)
    endor.pack_checkpoint(source, tmp_path / "packed")
    with pytest.raises(CheckpointError, match="needs 6 tensors"):
        endor.load_model(tmp_path / "packed")


def test_stacks_refuse_what_needs_all_experts(make_pair):
    model = endor.load_model(make_pair("mixtral").packed)
    module = experts_of(model)[0]
    with torch.no_grad():
        assert module.gate_up_proj[torch.tensor(3)].shape == (192, 64)
        with pytest.raises(ConfigError, match="one at a time"):
            _ = module.gate_up_proj[torch.tensor([0, 1])]
        with pytest.raises(ConfigError, match="one at a time"):
            torch.bmm(torch.zeros(6, 1, 64), module.gate_up_proj)
    with pytest.raises(ConfigError, match="cannot be replaced"):
        module.gate_up_proj = nn.Parameter(torch.zeros(1))
    with pytest.raises(ConfigError, match="keep their dtype"):
        module.float()


def test_classes_without_a_loop_are_refused():
    class Odd(nn.Module):
        def forward(self, x):
            return x

    with pytest.raises(ConfigError, match="Odd has no loop over experts"):
        eager_forward(Odd)


def test_other_implementations_are_not_needed(make_pair):
    """Whatever implementation is asked for, packed experts run the eager loop."""
    pair = make_pair("mixtral")
    for name in ("grouped_mm", "batched_mm", "eager"):
        model = AutoModelForCausalLM.from_pretrained(pair.packed, experts_implementation=name)
        pair.check(model)
