"""The iteration that ADMM and ALPS share."""

import torch

from endor.pruning.contract import Pattern
from endor.pruning.linalg import ScaledProblem
from endor.pruning.nm import nm_mask
from endor.pruning.select import keep_largest, zero_count


class SplitIteration:
    """What ADMM and ALPS repeat: sparse weights against weights that fit, in three buffers.

    With w the fitted weights and u the dual, each step takes the sparse half's choice among w + u,
    renews u, and fits anew: w = (target + penalty (sparse - u)) inverse. Nothing is allocated.

    Args:
        problem: Whose `weight` is taken over as `proposal`.
        pattern: The N:M pattern, or none.

    Attributes:
        proposal: w + u `(rows, cols)`, of which the sparse half keeps a part.
        target: weight times Gram matrix, `(rows, cols)`.
    """

    def __init__(self, problem: ScaledProblem, pattern: Pattern) -> None:
        self._pattern = pattern
        self.proposal = problem.weight
        self.target = problem.weight @ problem.gram  # rows are independent problems
        self._work = torch.empty_like(self.target)

    def choose(self, sparsity: float) -> torch.Tensor:
        """Return the sparse half's choice, bool: the largest of `proposal`, in the pattern if any.

        Args:
            sparsity: Share of zeros, of no effect on an N:M pattern.
        """
        if self._pattern.structured:
            score = torch.abs(self.proposal, out=self._work)
            return nm_mask(score, self._pattern.kept, self._pattern.group)
        zeros = zero_count(self.proposal.numel(), sparsity)
        return keep_largest(self.proposal, zeros, self._work)

    def step(
        self, keep: torch.Tensor, inverse: torch.Tensor, penalty: float, growth: float = 1.0
    ) -> None:
        """Renew `proposal`.

        Args:
            keep: The sparse half's choice.
            inverse: (Gram + penalty I)^-1.
            penalty: The penalty of this step.
            growth: What the penalty will be multiplied by after it.
        """
        work, dual = self._work.copy_(self.proposal), self.proposal.masked_fill_(keep, 0.0)
        work.sub_(dual, alpha=2)  # the sparse part less the dual
        work.mul_(penalty).add_(self.target)
        dual.addmm_(work, inverse, beta=1 / growth)
