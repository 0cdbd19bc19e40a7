"""Experts that are not at hand, replaced by those that are: `experts="lossy"`, never the default.

DAOP (arXiv 2501.10375) degrades gracefully where an expert would have to be fetched. Here, for few
tokens, a chosen expert that is not in VRAM (nor, where experts are read from disk, in memory) gives
its place to the best one that is, by the router's own scores, and the weights are brought back to
their sum. Each token's first choice is kept. What is at hand depends on what was used before and
on how fast reads are, so the output is neither the model's own nor, from disk, repeatable.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

KEPT = 1
"""First choices of each token that are never replaced."""


@dataclass(frozen=True, slots=True)
class Choice:
    """What tokens are routed to.

    Attributes:
        index: Experts, `(tokens, top_k)`, int64.
        weights: Of their results, `(tokens, top_k)`.
        replaced: How many of them the router did not choose.
    """

    index: torch.Tensor
    weights: torch.Tensor
    replaced: int = 0


def near_choice(
    logits: torch.Tensor, near: Sequence[bool], index: torch.Tensor, weights: torch.Tensor
) -> Choice:
    """Return a choice whose experts are near as far as there are any, each once a token.

    Args:
        logits: Of the router, `(tokens, experts)`.
        near: Whether each expert is at hand.
        index: What the router chose, `(tokens, top_k)`.
        weights: Of these.
    """
    here = torch.tensor(near, device=logits.device)
    absent = ~here[index]
    first = weights.topk(min(KEPT, weights.shape[1]), dim=1).indices
    absent.scatter_(1, first, torch.zeros_like(first, dtype=torch.bool))
    if not absent.any():
        return Choice(index, weights)
    likely = logits.float().softmax(-1)
    free = likely.masked_fill(~here, -1.0).scatter(1, index, -1.0)
    found = free.topk(min(index.shape[1], len(near)), dim=1)
    turn = (absent.cumsum(1) - 1).clamp(0, found.indices.shape[1] - 1)
    other, score = found.indices.gather(1, turn), found.values.gather(1, turn)
    given = absent & (score >= 0)
    if not given.any():
        return Choice(index, weights)
    share = score / likely.gather(1, index).clamp_min(torch.finfo(torch.float32).tiny)
    wide = weights.float()
    mixed = torch.where(given, wide * share.clamp(0.0, 1.0), wide)
    mixed *= wide.sum(1, keepdim=True) / mixed.sum(1, keepdim=True)
    return Choice(torch.where(given, other, index), mixed.to(weights.dtype), int(given.sum()))


def router_logits(router: nn.Module, hidden_states: torch.Tensor) -> torch.Tensor:
    """Return what a router's weight gives, `(tokens, experts)`, float32."""
    weight, bias = router.weight, getattr(router, "bias", None)
    assert isinstance(weight, torch.Tensor)
    with torch.no_grad():
        return F.linear(
            hidden_states.reshape(-1, weight.shape[1]).float(),
            weight.float(),
            bias.float() if isinstance(bias, torch.Tensor) else None,
        )
