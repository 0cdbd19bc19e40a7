"""Selection with ties, zeros of both signs and extremes, against sorting."""

import pytest
import torch

from endor.pruning.select import keep_mask


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
def test_the_dropped_are_the_first_of_a_stable_sort(kind, zeros):
    score = values(kind).abs()
    before = score.clone()
    order = score.flatten().argsort(stable=True)
    wanted = torch.ones(score.numel(), dtype=torch.bool)
    wanted[order[:zeros]] = False
    assert torch.equal(keep_mask(score, zeros).flatten(), wanted)
    assert torch.equal(score, before)
