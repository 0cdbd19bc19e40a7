"""Selection without new memory, and by counting bits, against sorting."""

import pytest
import torch

from endor.pruning.select import keep_largest, keep_mask, kth_by_counting


def values(kind):
    generator = torch.Generator().manual_seed(3)
    out = torch.randn(37, 53, generator=generator)
    if kind == "ties":
        out = (out * 3).round() / 3  # many equal magnitudes, +0.0 and -0.0
    if kind == "extreme":
        out[0, :4] = torch.tensor([1e-42, -3e38, 0.0, -0.0])
    return out


@pytest.mark.parametrize("kind", ["plain", "ties", "extreme"])
@pytest.mark.parametrize("zeros", [0, 1, 2, 977, 1960, 1961])
def test_the_largest_are_those_of_the_sorted_magnitudes(kind, zeros):
    given = values(kind)
    before = given.clone()
    order = given.abs().flatten().argsort(stable=True)
    wanted = torch.ones(given.numel(), dtype=torch.bool)
    wanted[order[:zeros]] = False
    found = keep_largest(given, zeros, torch.full_like(given, float("nan")))
    assert torch.equal(found.flatten(), wanted)
    assert torch.equal(found, keep_mask(given.abs(), zeros))
    assert torch.equal(given.view(torch.int32), before.view(torch.int32))


@pytest.mark.parametrize("kind", ["plain", "ties", "extreme"])
def test_counting_finds_every_order_statistic(kind):
    score = values(kind).abs().reshape(1, -1)
    ordered = score.sort(dim=1).values
    for count in [1, 2, 3, 500, 1700, score.shape[1]]:
        found = kth_by_counting(score, count)
        assert torch.equal(found, ordered[:, count - 1 : count])
