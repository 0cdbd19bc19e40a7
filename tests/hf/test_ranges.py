"""Layers are cut into contiguous ranges, and tensors move where a range begins."""

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.modeling_outputs import CausalLMOutputWithPast

from endor.hf.ranges import layer_ranges, move_between, moved, place_parameters, prefix_of

from .conftest import config_of

LAYERS = 8
SIZES = {f"model.layers.{at}": 10 for at in range(LAYERS)} | {"lm_head": 4, "": 10 * LAYERS + 8}
META = torch.device("meta")


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_config(
        config_of("llama", num_hidden_layers=LAYERS, tie_word_embeddings=False)
    )


def counts(places):
    """Layers per device."""
    found = {}
    for at in range(LAYERS):
        home = places[prefix_of(f"model.layers.{at}.mlp", places)]
        found[home] = found.get(home, 0) + 1
    return found


@pytest.mark.parametrize(
    ("mode", "budgets", "expected"),
    [
        ("auto", {"a": 50, "b": 50}, {"a": 4, "b": 4}),
        ("balanced", {"a": 25, "b": 75}, {"a": 2, "b": 6}),
        ("auto", {"a": 5, "b": 5, "c": 10}, {"a": 2, "b": 2, "c": 4}),
        ("sequential", {"a": 200, "b": 50}, {"a": 8}),
        ("sequential", {"a": 55, "b": 50}, {"a": 5, "b": 3}),
        ("sequential", {"a": 10, "b": 10}, {"a": 4, "b": 4}),
        ("balanced_low_0", {"a": 90, "b": 90}, {"b": 8}),
        ("balanced_low_0", {"a": 90, "b": 60}, {"a": 2, "b": 6}),
    ],
)
def test_ranges(model, mode, budgets, expected):
    places = layer_ranges(model, SIZES, budgets, mode)
    assert counts(places) == expected
    order = [places[f"model.layers.{at}"] for at in range(LAYERS)]
    assert order == sorted(order)
    if len(budgets) > 1:
        assert places["lm_head"] == places["model.norm"] == max(order)


def test_one_device_takes_everything(model):
    assert layer_ranges(model, SIZES, {"a": 1}, "auto") == {"": "a"}


def test_a_tied_head_stays_with_the_embeddings():
    model = AutoModelForCausalLM.from_config(config_of("llama", tie_word_embeddings=True))
    places = layer_ranges(model, {"": 30, "model.layers.0": 10}, {"a": 1, "b": 1}, "auto")
    assert places[prefix_of("lm_head", places)] == places[prefix_of("model.embed_tokens", places)]


def test_inputs_move_where_a_device_begins(model):
    places = {"": torch.device("cpu"), "model.layers.3": META, "model.layers.4": META}
    hooked = move_between(model, places)
    assert {"model.layers.3", "model.layers.4", "model.norm", "lm_head"} <= set(hooked)
    assert not [name for name in hooked if name.startswith("model.layers.3.")]
    assert "model.layers.2.mlp.up_proj" in hooked, "a leaf of the rest may follow any device"
    seen = []

    def look(module, args, kwargs):
        seen.append((args[0].device, kwargs["position_embeddings"][0].device))
        raise KeyboardInterrupt

    model.model.layers[3].register_forward_pre_hook(look, with_kwargs=True)
    with pytest.raises(KeyboardInterrupt):
        model(torch.tensor([[1, 2]]))
    assert seen == [(META, META)]


def test_parameters_are_placed_and_shared_ones_once():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.BatchNorm1d(2))
    model[1].weight = model[0].weight
    place_parameters(model, {"": torch.device("cpu"), "1": META, "2": META})
    assert model[0].weight is model[1].weight
    assert model[0].weight.device.type == "cpu"
    assert {model[1].bias.device, model[2].running_mean.device} == {META}


def test_what_holds_no_tensor_is_left_alone():
    cache = object()
    tensor = torch.ones(2)
    inside = {"a": (tensor, [tensor, None]), "cache": cache}
    found = moved(inside, META)
    assert found["a"][0].device == found["a"][1][0].device == META
    assert found["cache"] is cache
    assert moved(inside, torch.device("cpu")) is inside
    output = moved(CausalLMOutputWithPast(logits=tensor, past_key_values=cache), META)
    assert isinstance(output, CausalLMOutputWithPast)
    assert output.logits.device == META
    assert output.past_key_values is cache
