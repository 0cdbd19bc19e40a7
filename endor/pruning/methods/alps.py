"""ALPS (arXiv 2406.07831): ADMM whose penalty grows until the mask settles, then an exact fit.

A small penalty lets the mask move; a large one freezes it. Each growth needs the matrix inverted
again. When the mask is final, conjugate gradients find the least squares survivors under it.
"""

import torch

from endor.pruning.contract import PruneOptions
from endor.pruning.linalg import ScaledProblem
from endor.pruning.methods.splitting import SplitIteration

PENALTY = 0.1
EVERY = 3
MOST_ROUNDS = 20
"""Penalties tried, `EVERY` steps each."""
FIT_STEPS = 10

_GROWTH = ((0.1, 1.3), (0.005, 1.2), (0.0, 1.1))
"""Penalty factor by the share of survivors that changed since the penalty before."""


class Alps:
    """Statistic: mean x xᵀ. Zeros are counted per matrix (or N:M group), exactly."""

    def __init__(self, options: PruneOptions) -> None:
        self._pattern = options.parsed_pattern
        self._dampening = options.dampening

    def solve(self, weight: torch.Tensor, statistic: torch.Tensor, sparsity: float) -> torch.Tensor:
        """Return the pruned weight, survivors at their least squares values."""
        problem = ScaledProblem(weight, statistic, self._dampening)
        iteration = SplitIteration(problem, self._pattern)
        keep = iteration.choose(sparsity)
        survivors = max(1, int(keep.sum()))
        penalty = PENALTY
        for _ in range(MOST_ROUNDS):
            inverse = problem.inverse(penalty)
            for _ in range(EVERY - 1):
                iteration.step(iteration.choose(sparsity), inverse, penalty)
            before, keep = keep, iteration.choose(sparsity)
            changed = int((keep & ~before).sum()) / survivors
            growth = next((factor for least, factor in _GROWTH if changed > least), 1.0)
            iteration.step(keep, inverse, penalty, growth)
            if growth == 1.0:
                break
            penalty *= growth
        found = fit_survivors(iteration.fitted, iteration.target, problem.gram, keep)
        return problem.unscale(found, keep)


def fit_survivors(
    start: torch.Tensor, target: torch.Tensor, gram: torch.Tensor, keep: torch.Tensor
) -> torch.Tensor:
    """Return weights, zero outside `keep`, whose product with `gram` is nearest `target`.

    Conjugate gradients on all rows at once, each with its own step lengths, started from the kept
    part of `start` and preconditioned by the (unit) diagonal. A row stops when its residual is
    at rounding level.
    """
    fitted = torch.where(keep, start, 0.0)
    residual = torch.where(keep, target - fitted @ gram, 0.0)
    direction = residual
    power = residual.square().sum(1, keepdim=True)
    floor = power * 1e-12
    for _ in range(FIT_STEPS):
        product = torch.where(keep, direction @ gram, 0.0)
        curvature = (direction * product).sum(1, keepdim=True)
        active = (power > floor) & (curvature > 0)
        step = torch.where(active, power / curvature.clamp_min(1e-30), 0.0)
        fitted = fitted + step * direction
        residual = residual - step * product
        renewed = residual.square().sum(1, keepdim=True)
        direction = (
            residual + torch.where(active, renewed / power.clamp_min(1e-30), 0.0) * direction
        )
        power = renewed
    return fitted
