"""The iteration that ADMM and ALPS share."""

import torch

from endor.pruning.contract import Pattern
from endor.pruning.linalg import ScaledProblem
from endor.pruning.methods.nm import nm_mask
from endor.pruning.select import keep_mask, zero_count


class SplitIteration:
    """Weights that fit the outputs against weights that are sparse, made to agree step by step.

    With w the fitted weights and u the dual, a step takes the sparse half's choice s among w + u,
    renews u = w + u - s, and fits anew: w = (target + penalty (s - u)) inverse. That happens in
    three matrices made once; only choosing takes new memory.

    Args:
        problem: Whose `weight` is taken over.
        pattern: The N:M pattern, or none.

    Attributes:
        proposal: w + u `(rows, cols)`, of which the sparse half keeps a part.
        fitted: w `(rows, cols)`.
        target: The dense weight times the Gram matrix `(rows, cols)`.
    """

    def __init__(self, problem: ScaledProblem, pattern: Pattern) -> None:
        self._pattern = pattern
        self.target = problem.weight @ problem.gram  # rows are independent problems
        self.proposal = problem.weight
        self.fitted = torch.empty_like(self.target)
        self._work = torch.empty_like(self.target)

    def choose(self, sparsity: float) -> torch.Tensor:
        """Return the sparse half's choice, bool: the largest of `proposal`, in the pattern if any.

        Args:
            sparsity: Share of zeros, of no effect on an N:M pattern.
        """
        score = torch.abs(self.proposal, out=self._work)
        if self._pattern.structured:
            return nm_mask(score, self._pattern.kept, self._pattern.group)
        return keep_mask(score, zero_count(score.numel(), sparsity))

    def step(
        self, keep: torch.Tensor, inverse: torch.Tensor, penalty: float, growth: float = 1.0
    ) -> None:
        """Renew `fitted` and `proposal`.

        Args:
            keep: The sparse half's choice.
            inverse: (Gram + penalty I)^-1.
            penalty: The penalty of this step.
            growth: What the penalty is multiplied by after it; the dual is in units of 1 / penalty.
        """
        work = self._work.copy_(self.proposal)
        dual = self.proposal.masked_fill_(keep, 0.0)
        work.sub_(dual, alpha=2).mul_(penalty).add_(self.target)
        torch.mm(work, inverse, out=self.fitted)
        torch.add(self.fitted, dual.div_(growth), out=self.proposal)
