"""ADMM pruning (Boža, arXiv 2401.02938): mask and survivors found together.

Splits "fit the layer's outputs" from "be sparse". The fit is one product with a matrix that is
inverted once; the sparse half keeps the largest entries. The mask tightens over the first steps
and is then held while the survivors converge.
"""

import torch

from endor.pruning.contract import PruneOptions
from endor.pruning.linalg import ScaledProblem
from endor.pruning.nm import nm_mask
from endor.pruning.select import keep_mask, zero_count

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
        target = problem.weight @ problem.gram  # rows are independent problems
        fitted = problem.weight
        dual = torch.zeros_like(fitted)
        keep = torch.ones_like(fitted, dtype=torch.bool)
        for step in range(STEPS):
            proposal = fitted + dual
            if step < MASK_STEPS:
                keep = self._mask(proposal, sparsity, (step + 1) / MASK_STEPS)
            sparse = torch.where(keep, proposal, 0.0)
            dual = proposal - sparse
            fitted = (target + PENALTY * (sparse - dual)) @ inverse
        return problem.unscale(fitted + dual, keep)

    def _mask(self, proposal: torch.Tensor, sparsity: float, progress: float) -> torch.Tensor:
        score = proposal.abs()
        if self._pattern.structured:
            return nm_mask(score, self._pattern.kept, self._pattern.group)
        reached = sparsity * (1 - (1 - progress) ** 3)
        return keep_mask(score, zero_count(score.numel(), reached))
