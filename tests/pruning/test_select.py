"""Selection without new memory, against sorting."""

import pytest
import torch

from endor.pruning.select import keep_largest, keep_mask


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
