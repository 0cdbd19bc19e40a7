"""N:M masks: at most N survivors in every M neighbours along the inputs."""

import torch


def nm_mask(score: torch.Tensor, kept: int, group: int) -> torch.Tensor:
    """Return the bool mask that keeps the `kept` highest scores of every `group` inputs.

    Ties go to the higher index, as in `select`. A short last group keeps up to `kept` as well.

    Args:
        score: `(..., cols)`, no NaN, not negative.
        kept: Survivors of a group, at least 1.
        group: Neighbours of a group.
    """
    cols = score.shape[-1]
    padded = torch.nn.functional.pad(score, (0, -cols % group), value=-1.0)
    groups = padded.reshape(*score.shape[:-1], -1, group)
    order = groups.argsort(dim=-1, stable=True)  # the last `kept` stay
    keep = torch.zeros_like(groups, dtype=torch.bool)
    keep.scatter_(-1, order[..., group - kept :], True)
    return keep.reshape(padded.shape)[..., :cols].contiguous()
