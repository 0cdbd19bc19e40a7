"""SparseGPT (arXiv 2301.00774): prune column by column, spread each error over later columns."""

import torch

from endor.pruning.contract import PruneOptions
from endor.pruning.linalg import damped_cholesky, prepare_gram
from endor.pruning.methods.nm import nm_mask
from endor.pruning.select import keep_mask, zero_count


class SparseGpt:
    """Statistic: mean x xᵀ. Zeros are counted per block of columns over all rows, exactly."""

    def __init__(self, options: PruneOptions) -> None:
        self._pattern = options.parsed_pattern
        self._dampening = options.dampening
        group = self._pattern.group or 1
        self._block = -(-options.block_size // group) * group  # groups never straddle blocks

    def solve(self, weight: torch.Tensor, statistic: torch.Tensor, sparsity: float) -> torch.Tensor:
        """Return the pruned weight, survivors updated."""
        gram, dead = prepare_gram(statistic)
        inverse = torch.cholesky_inverse(damped_cholesky(gram, self._dampening))
        # Row i of the upper factor: how input i's error is best undone by the inputs after it.
        factor = damped_cholesky(inverse, 0.0).T.contiguous()
        work = weight.clone()
        rows, cols = weight.shape
        result = torch.empty_like(weight)
        done = 0  # zeros so far: rounding never accumulates over blocks
        for start in range(0, cols, self._block):
            stop = min(start + self._block, cols)
            block = work[:, start:stop]
            local = factor[start:stop, start:stop]
            quota = zero_count(rows * stop, sparsity) - done
            done += quota
            keep = None
            if not self._pattern.structured:
                score = (block / local.diagonal()).square()
                score[:, dead[start:stop]] = 0.0
                keep = keep_mask(score, quota)
            result[:, start:stop], errors = self._prune_block(block, local, keep, dead[start:stop])
            work[:, stop:] -= errors @ factor[start:stop, stop:]
        return result

    def _prune_block(
        self,
        block: torch.Tensor,
        factor: torch.Tensor,
        keep: torch.Tensor | None,
        dead: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the pruned block and the scaled error of every column.

        Without `keep`, each N:M group is decided when its first column is reached, from weights
        that already carry the corrections of the groups before it.
        """
        block = block.clone()
        result = torch.empty_like(block)
        errors = torch.empty_like(block)
        group = self._pattern.group
        chosen = torch.empty_like(block, dtype=torch.bool) if keep is None else keep
        for column in range(block.shape[1]):
            if keep is None and column % group == 0:
                ahead = slice(column, column + group)
                score = (block[:, ahead] / factor.diagonal()[ahead]).square()
                score[:, dead[ahead]] = 0.0
                chosen[:, ahead] = nm_mask(score, self._pattern.kept, group)
            value = block[:, column]
            kept = torch.where(chosen[:, column], value, 0.0)
            error = (value - kept) / factor[column, column]
            block[:, column + 1 :] -= error[:, None] * factor[column, column + 1 :]
            result[:, column] = kept
            errors[:, column] = error
        return result, errors
