"""Routers are found where they can be asked without anyone noticing."""

import torch
from torch import nn

from endor.hf.routing import routers

from .conftest import prompt


def test_routers_in_order(make_pair):
    for kind, layers in (("mixtral", [0, 1, 2]), ("qwen3_moe", [0, 1, 2]), ("qwen2_moe", [1])):
        model = make_pair(kind).dense
        assert [router.name for router in routers(model)] == [
            f"model.layers.{layer}.mlp" for layer in layers
        ]
    assert list(routers(make_pair("llama").dense)) == []


def test_a_router_chooses_as_in_the_model(make_pair):
    model = make_pair("mixtral").dense
    router = next(routers(model))
    seen, calls = [], []
    handles = [
        router.experts.register_forward_pre_hook(lambda _, args: seen.append(args[:2])),
        router.module.register_forward_hook(lambda *_: calls.append(1)),
    ]
    with torch.no_grad():
        model(prompt())
    hidden, index = seen[0]
    assert torch.equal(router.choose(hidden), index)
    assert len(calls) == 1, "hooks do not see the question"
    for handle in handles:
        handle.remove()


def test_other_routers_are_left_out():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(4, 8))

        def forward(self, hidden_states, tokens):
            return hidden_states, tokens

    class Scores(Odd):
        def forward(self, hidden_states):
            return hidden_states @ self.weight.T

    for router in (Odd(), Scores(), nn.Identity()):
        block = nn.Module()
        block.gate, block.experts = router, nn.ModuleList()
        assert list(routers(nn.ModuleList([block]))) == []
