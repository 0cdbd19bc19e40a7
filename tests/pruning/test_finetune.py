"""Re-training survivors: the error falls, zeros stay, everything unselected stays."""

import pytest
import torch
from torch import nn

from endor.models.pieces import Piece
from endor.pruning.activations import Activations
from endor.pruning.finetune import Schedule, finetune, token_loss
from endor.pruning.layer import Matrix
from endor.pruning.skeleton import Call


class Block(nn.Module):
    """Two matrices and a residual, the second beside rows that are not pruned."""

    def __init__(self):
        super().__init__()
        self.up = nn.Linear(16, 32, bias=False)
        self.down = nn.Linear(32, 16, bias=False)

    def forward(self, hidden):
        return hidden + self.down(torch.relu(self.up(hidden)))


@pytest.fixture
def problem(tmp_path):
    torch.manual_seed(0)
    block = Block().requires_grad_(False)
    hidden = torch.randn(12, 8, 16)
    inputs = Activations(hidden.shape, 1 << 30, tmp_path)
    inputs.write(0, hidden)
    targets = Activations(hidden.shape, 1 << 30, tmp_path)
    targets.write(0, block(hidden))
    block.up.weight.copy_(torch.where(torch.rand(32, 16) < 0.6, block.up.weight, 0.0))
    top = block.down.weight[:8]
    top.copy_(torch.where(torch.rand(8, 32) < 0.6, top, 0.0))
    matrices = [
        Matrix("up", block.up.weight, Piece("up", 0, 1, 0, 32, 16), False),
        Matrix("down", block.down.weight, Piece("down", 0, 1, 0, 8, 32), False),
    ]
    return block, inputs, targets, matrices


def error(block, inputs, targets):
    return float((block(inputs.read(0, 12)) - targets.read(0, 12)).square().mean())


def test_the_error_falls_and_zeros_and_the_unselected_stay(problem):
    block, inputs, targets, matrices = problem
    before = error(block, inputs, targets)
    masks = [matrix.weight == 0 for matrix in matrices]
    rest = block.down.weight[8:].clone()
    schedule = Schedule(passes=30, rate=0.05)
    finetune(block, Call((), {}), inputs, targets, 12, matrices, 0, schedule, torch.float32)
    assert error(block, inputs, targets) < 0.7 * before
    for matrix, mask in zip(matrices, masks, strict=True):
        assert torch.equal(matrix.weight == 0, mask)
    assert torch.equal(block.down.weight[8:], rest)
    assert not block.up.weight.requires_grad
    assert block.up.weight.grad is None


def test_the_same_seed_gives_the_same_bits(problem):
    block, inputs, targets, matrices = problem
    start = [matrix.weight.clone() for matrix in matrices]
    results = []
    for _ in range(2):
        for matrix, weight in zip(matrices, start, strict=True):
            matrix.weight.copy_(weight)
        finetune(
            block, Call((), {}), inputs, targets, 12, matrices, 3, Schedule(passes=2), torch.float32
        )
        results.append(block.up.weight.clone())
    assert torch.equal(*results)
    assert not torch.equal(results[0], start[0])


def test_a_token_weighs_what_its_size_is_among_the_others():
    directions = nn.functional.normalize(torch.randn(2, 8, 16), dim=-1)
    wanted = 3.0 * directions
    wanted[0, 0] *= 100  # a massive activation
    lost = []
    for token in ((0, 0), (1, 3)):
        found = wanted.clone()
        found[token] = 0.0
        lost.append(float(token_loss(found, wanted)))
    assert lost == pytest.approx([100 / 16, 1 / 16])
    found = wanted + torch.randn_like(wanted)
    assert float(token_loss(7 * found, 7 * wanted)) == pytest.approx(
        float(token_loss(found, wanted))
    )


def test_a_hidden_state_of_zeros_gives_a_finite_loss():
    assert torch.isfinite(token_loss(torch.ones(1, 2, 4), torch.zeros(1, 2, 4)))
