"""Wanda (arXiv 2306.11695): drop the smallest |weight| x input norm of every output row."""

import torch

from endor.pruning.contract import PruneOptions
from endor.pruning.methods.nm import nm_mask
from endor.pruning.select import keep_mask_rows, row_zero_counts


class Wanda:
    """Mask only: survivors keep their value. Statistic: mean x² of every input."""

    def __init__(self, options: PruneOptions) -> None:
        self._pattern = options.parsed_pattern

    def solve(self, weight: torch.Tensor, statistic: torch.Tensor, sparsity: float) -> torch.Tensor:
        """Return `weight` with the lowest scores of every row (or N:M group) set to zero."""
        score = weight.abs() * statistic.sqrt()
        if self._pattern.structured:
            keep = nm_mask(score, self._pattern.kept, self._pattern.group)
        else:
            rows, cols = weight.shape
            keep = keep_mask_rows(score, row_zero_counts(rows, cols, sparsity))
        return torch.where(keep, weight, 0.0)
