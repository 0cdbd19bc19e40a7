"""Experts of any form: what each matrix multiplies is seen, whichever way it is written."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from endor.errors import PruningError
from endor.pruning.stacks import Use, statistics, uses

EXPERTS, INPUTS, OUTPUTS = 3, 4, 6


class Stack(nn.Module):
    """Experts whose products are written in one of several ways."""

    def __init__(self, product, turned):
        super().__init__()
        shape = (INPUTS, OUTPUTS) if turned else (OUTPUTS, INPUTS)
        self.weight = nn.Parameter(torch.randn(EXPERTS, *shape), requires_grad=False)
        self.product = product

    def forward(self, x, routes):
        return [self.product(x[routes == expert], self.weight[expert]) for expert in range(EXPERTS)]


WAYS = {
    "linear": (F.linear, False),
    "linear of a transpose": (lambda x, w: F.linear(x, w.t()), True),
    "matmul": (lambda x, w: x @ w, True),
    "matmul of a transpose": (lambda x, w: x @ w.T, False),
    "matmul of another transpose": (lambda x, w: torch.matmul(x, w.transpose(0, 1)), False),
    "in another type": (lambda x, w: F.linear(x.double(), w.to(torch.float64)), False),
}


@pytest.mark.parametrize(("product", "turned"), WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("kind", ["gram", "diagonal"])
def test_each_experts_own_inputs(product, turned, kind):
    torch.manual_seed(0)
    layer = nn.ModuleDict({"experts": Stack(product, turned)})
    x, routes = torch.randn(60, INPUTS), torch.randint(0, EXPERTS, (60,))
    halves = [slice(0, 30), slice(30, 60)]
    outputs = []

    def batches():
        for half in halves:
            yield lambda half=half: outputs.append(layer["experts"](x[half], routes[half]))

    plain = [layer["experts"](x[half], routes[half]) for half in halves]
    (use,) = uses(layer, ["experts.weight"], next(batches()))
    assert use == Use("experts.weight", turned)
    found = {}
    statistics(layer, use, batches, kind, found.__setitem__)
    for expert in range(EXPERTS):
        own = x[routes == expert]
        want = own.T @ own / len(own) if kind == "gram" else own.square().mean(0)
        torch.testing.assert_close(found[expert], want)
    assert isinstance(layer["experts"].weight, nn.Parameter)
    assert all(torch.equal(a, b) for a, b in zip(outputs[0], plain[0], strict=True))


def test_all_at_once():
    class Batched(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(EXPERTS, INPUTS, OUTPUTS), requires_grad=False)

        def forward(self, x):
            return torch.bmm(x.view(len(self.weight), -1, self.weight.shape[1]), self.weight)

    layer, x = Batched(), torch.randn(EXPERTS * 10, INPUTS)
    (use,) = uses(layer, ["weight"], lambda: layer(x))
    found = {}
    statistics(layer, use, lambda: iter([lambda: layer(x)]), "gram", found.__setitem__)
    for expert, own in enumerate(x.view(EXPERTS, 10, INPUTS)):
        torch.testing.assert_close(found[expert], own.T @ own / 10)
    assert use.turned


def test_an_expert_of_few_tokens_is_given_the_mean_of_the_others():
    layer = nn.ModuleDict({"experts": Stack(F.linear, False)})
    x, routes = torch.randn(41, INPUTS), torch.tensor([0] * 20 + [1] * 20 + [2])
    use = Use("experts.weight", False)
    found = {}
    run = lambda: layer["experts"](x, routes)  # noqa: E731
    statistics(layer, use, lambda: iter([run]), "gram", found.__setitem__)
    mean, own = x.T @ x / 41, torch.outer(x[40], x[40])
    torch.testing.assert_close(found[2], (own + (INPUTS - 1) * mean) / INPUTS)


@pytest.mark.parametrize("room", [1, 1 << 30], ids=["one a pass", "all in one pass"])
@pytest.mark.parametrize("kind", ["gram", "diagonal"])
def test_an_expert_without_tokens_is_given_the_mean_of_all(monkeypatch, room, kind):
    monkeypatch.setattr("endor.pruning.stacks.GRAM_BYTES", room)
    layer = nn.ModuleDict({"experts": Stack(F.linear, False)})
    x, routes = torch.randn(40, INPUTS), torch.tensor([0, 2] * 20)
    found = {}
    statistics(
        layer,
        Use("experts.weight", False),
        lambda: iter([lambda: layer["experts"](x, routes)]),
        kind,
        found.__setitem__,
    )
    whole = x.T @ x / 40 if kind == "gram" else x.square().mean(0)
    torch.testing.assert_close(found[1], whole)
    own = x[routes == 2]
    torch.testing.assert_close(
        found[2], own.T @ own / 20 if kind == "gram" else own.square().mean(0)
    )


def test_where_no_expert_has_tokens_all_inputs_count_the_same():
    layer, found = nn.ModuleDict({"experts": Stack(F.linear, False)}), {}
    use, none = Use("experts.weight", False), torch.zeros(0, INPUTS)
    run = [lambda: layer["experts"](none, torch.zeros(0))]
    statistics(layer, use, lambda: iter(run), "gram", found.__setitem__)
    assert all(torch.equal(item, torch.eye(INPUTS)) for item in found.values())


def test_a_use_that_cannot_be_seen_is_refused():
    layer = nn.ModuleDict({"experts": Stack(lambda x, w: (x[:, None] * w).sum(-1), False)})
    with pytest.raises(PruningError, match="Stack uses its experts"):
        uses(
            layer,
            ["experts.weight"],
            lambda: layer["experts"](torch.randn(3, INPUTS), torch.arange(3)),
        )
    assert isinstance(layer["experts"].weight, nn.Parameter)
