"""ADMM pruning (Boža, arXiv 2401.02938): mask and survivors found together.

Splits "fit the layer's outputs" from "be sparse". The fit is one product with a matrix that is
inverted once; the sparse half keeps the largest entries. The mask tightens over the first steps
and is then held while the survivors converge.
"""

import torch

from endor.pruning.contract import PruneOptions
from endor.pruning.linalg import ScaledProblem
from endor.pruning.methods.splitting import SplitIteration

STEPS = 20
MASK_STEPS = 15
PENALTY = 1.0  # in the units of a unit-diagonal Gram matrix


class Admm:
    """Statistic: mean x xᵀ. Zeros are counted per matrix (or N:M group), exactly."""

    def __init__(self, options: PruneOptions) -> None:
        self._pattern = options.parsed_pattern
        self._dampening = options.dampening

    def solve(self, weight: torch.Tensor, statistic: torch.Tensor, sparsity: float) -> torch.Tensor:
        """Return the pruned weight, survivors re-fitted."""
        problem = ScaledProblem(weight, statistic, self._dampening)
        inverse = problem.inverse(PENALTY)
        iteration = SplitIteration(problem, self._pattern)
        keep = torch.ones_like(weight, dtype=torch.bool)
        for step in range(STEPS):
            if step < MASK_STEPS:
                left = 1 - (step + 1) / MASK_STEPS
                keep = iteration.choose(sparsity * (1 - left**3))
            iteration.step(keep, inverse, PENALTY)
        return problem.unscale(iteration.proposal, keep)
