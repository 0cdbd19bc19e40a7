"""Experts replaced by those at hand: only where asked for, only for few tokens, and always said."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import endor
from endor.errors import ConfigError
from endor.hf.lossy_experts import KEPT, near_choice, router_logits
from endor.planning import Placement

from .conftest import prompt


@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 1 << 30),
    near=st.lists(st.booleans(), min_size=3, max_size=9),
    top_k=st.integers(1, 3),
    tokens=st.integers(1, 8),
)
def test_what_is_absent_gives_its_place_to_the_best_that_is_near(seed, near, top_k, tokens):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(tokens, len(near), generator=generator)
    weights, index = logits.softmax(-1).topk(top_k, dim=1)
    weights = (weights / weights.sum(1, keepdim=True)).to(torch.bfloat16)
    found = near_choice(logits, near, index, weights)
    replaced = found.index != index
    assert found.replaced == int(replaced.sum())
    assert not replaced[:, :KEPT].any()
    here = torch.tensor(near)
    assert here[found.index[replaced]].all()
    assert not here[index[replaced]].any()
    for token in range(tokens):
        chosen = found.index[token].tolist()
        assert len(set(chosen)) == top_k
        better = [e for e in range(len(near)) if near[e] and e not in chosen]
        for expert in found.index[token][replaced[token]].tolist():
            assert all(logits[token, expert] >= logits[token, other] for other in better)
        left = ~here[index[token]] & ~replaced[token]
        if left[KEPT:].any():  # then nothing that is near was free
            assert not better
    before, after = weights.float().sum(1), found.weights.float().sum(1)
    assert (before - after).abs().max() <= 2.0**-6 * before.max()
    if not found.replaced:
        assert found.index is index
        assert found.weights is weights


def test_a_replaced_experts_weight_falls_with_its_score():
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.05]]))
    weights = torch.tensor([[0.6, 0.4]])
    found = near_choice(logits, [True, False, False, True], torch.tensor([[0, 1]]), weights)
    assert found.index.tolist() == [[0, 3]]
    other = 0.4 * 0.05 / 0.3
    expected = torch.tensor([[0.6, other]]) / (0.6 + other)
    torch.testing.assert_close(found.weights, expected)


def half_on_disk(store, seed: int = 0) -> Placement:
    """Every second expert in memory, which is a cache; room for few others."""
    routed = [unit for unit in store.units if not unit.scheduled]
    tiers = dict.fromkeys((unit.name for unit in store.units), "resident")
    tiers |= dict.fromkeys((unit.name for unit in routed[::2]), "disk")
    return Placement(tiers, 2 * max(unit.nbytes for unit in routed))


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
def test_a_lossy_model_says_so(make_pair, kind):
    pair = make_pair(kind)
    store = endor.load_model(pair.packed).endor
    model = endor.load_model(pair.packed, placement=half_on_disk(store), experts="lossy")
    model.endor.preload()
    with torch.no_grad():
        text = model.generate(prompt(1, 5), max_new_tokens=16, do_sample=False)
    assert text.shape == (1, 21)
    counters = model.endor.ledger.counters
    assert 0 < counters.lossy_replaced < counters.lossy_choices
    report = model.endor.report()
    assert report["experts"] == "lossy"
    assert report["counters"]["lossy_replaced"] == counters.lossy_replaced
    assert model.config.quantization_config.experts == "lossy"


def test_a_prompt_keeps_its_bits(make_pair):
    """More than eight tokens use nearly all experts: nothing is replaced."""
    pair = make_pair("mixtral")
    store = endor.load_model(pair.packed).endor
    model = endor.load_model(pair.packed, placement=half_on_disk(store), experts="lossy")
    ids = prompt(2, 9)
    assert torch.equal(pair.logits(model, ids), pair.logits(pair.dense, ids))
    assert model.endor.ledger.counters.lossy_choices == 0


def test_gradients_are_of_the_model_itself(make_pair):
    pair = make_pair("mixtral")
    store = endor.load_model(pair.packed).endor
    model = endor.load_model(pair.packed, placement=half_on_disk(store), experts="lossy")
    model(prompt(1, 4), labels=prompt(1, 4)).loss.backward()
    assert model.endor.ledger.counters.lossy_choices == 0


def test_what_is_all_in_memory_keeps_its_bits(make_pair):
    pair = make_pair("mixtral")
    model = endor.load_model(pair.packed, experts="lossy")
    pair.check(model)
    assert model.endor.ledger.counters.lossy_replaced == 0


def test_exact_is_the_default(make_pair):
    pair = make_pair("mixtral")
    store = endor.load_model(pair.packed).endor
    model = endor.load_model(pair.packed, placement=half_on_disk(store))
    pair.check(model)
    assert model.endor.report()["experts"] == "exact"
    assert model.endor.ledger.counters.lossy_choices == 0


@pytest.mark.parametrize("placed", [True, False])
def test_a_model_without_experts_is_refused(make_pair, placed):
    pair = make_pair("llama")
    units = endor.load_model(pair.packed).endor.units
    whole = Placement(dict.fromkeys((unit.name for unit in units), "resident"), 0)
    options = {"placement": whole} if placed else {}
    with pytest.raises(ConfigError, match="mixtures of experts"):
        endor.load_model(pair.packed, experts="lossy", **options)


def test_other_words_are_refused(make_pair):
    with pytest.raises(ConfigError, match="exact or lossy, got 'fast'"):
        endor.load_model(make_pair("mixtral").packed, experts="fast")


def test_logits_are_the_routers(make_pair):
    model = make_pair("mixtral").dense
    gate = model.model.layers[0].mlp.gate
    states = torch.randn(4, gate.weight.shape[1], dtype=gate.weight.dtype)
    found = router_logits(gate, states)
    weights, index = found.softmax(-1).topk(2, dim=1)
    assert weights.shape == (4, 2)
    with torch.no_grad():
        chosen = next(i for i in gate(states) if i.dtype == torch.int64)
    assert torch.equal(index.sort(1).values, chosen.sort(1).values)
