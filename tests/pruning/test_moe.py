"""Experts: each by its own tokens, rare ones topped up by a stated rule."""

import torch
from torch import nn

from endor.pruning.activations import Activations
from endor.pruning.moe import RoutedTokens, renew_experts


def routed(tmp_path, hidden, routes, batch):
    room = Activations((-(-len(hidden) // batch), batch, hidden.shape[1]), 0, tmp_path)
    tokens = RoutedTokens(room, 3)
    for start in range(0, len(hidden), batch):
        tokens.add(hidden[start : start + batch], routes[start : start + batch])
    return tokens


def test_a_rare_expert_is_shown_the_first_tokens_of_others(tmp_path):
    routes = torch.tensor([[0], [1], [0], [2], [0], [1]])
    tokens = routed(tmp_path, torch.randn(6, 4), routes, 4)
    tokens.close()
    assert [part.tolist() for part in tokens.chosen(0, 3)] == [[0, 2], [0]]
    assert [part.tolist() for part in tokens.chosen(2, 3)] == [[0, 1, 3], []]
    assert [part.tolist() for part in tokens.chosen(1, 100)] == [[0, 1, 2, 3], [0, 1]]


def test_each_expert_gets_the_statistics_of_its_tokens(tmp_path):
    torch.manual_seed(0)
    hidden = torch.randn(50, 4)
    routes = torch.stack([torch.randperm(3)[:2] for _ in range(50)])
    module = nn.Module()
    module.gate_up_proj = nn.Parameter(torch.randn(3, 10, 4), requires_grad=False)
    module.down_proj = nn.Parameter(torch.randn(3, 4, 5), requires_grad=False)
    module.act_fn = torch.relu
    seen = []

    def renew(weight, statistic):
        seen.append((tuple(weight.shape), statistic))
        weight.copy_(torch.where(weight.abs() < 0.5, 0.0, weight))

    views = {
        name: [[getattr(module, name)[expert]] for expert in range(3)]
        for name in ("gate_up_proj", "down_proj")
    }
    tokens = routed(tmp_path, hidden, routes, 20)
    renew_experts(module, tokens, "gram", views, renew)
    tokens.close()
    for expert in range(3):
        own = hidden[(routes == expert).any(1)]
        shape, gram = seen[expert]
        assert shape == (10, 4)
        torch.testing.assert_close(gram, own.T @ own / len(own))
        gate, up = (own @ module.gate_up_proj[expert].T).chunk(2, 1)  # pruned by now
        inner = torch.relu(gate) * up
        shape, gram = seen[3 + expert]
        assert shape == (4, 5)
        torch.testing.assert_close(gram, inner.T @ inner / len(inner))
    assert bool((module.down_proj == 0).any())
