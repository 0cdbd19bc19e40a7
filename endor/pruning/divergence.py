"""How far the predictions of a renewed model are from the dense one's."""

import torch

from endor.pruning.activations import Activations
from endor.pruning.skeleton import Skeleton


def divergence(
    skeleton: Skeleton,
    ids: torch.Tensor,
    renewed: Activations,
    dense: Activations,
    device: torch.device,
) -> float:
    """Return KL(dense || renewed) of the predictions on windows, nats a token.

    Args:
        skeleton: The model, for its head.
        ids: Tokens `(windows, tokens)`.
        renewed: Hidden states behind the renewed layers.
        dense: Hidden states behind the dense layers.
        device: Where to compute.
    """
    total, tokens = 0.0, 0
    with skeleton.head() as logits:
        for window in range(len(ids)):
            given = ids[window : window + 1]
            found, wanted = (
                logits(given, hidden.read(window, window + 1).to(device))[0].log_softmax(-1)
                for hidden in (renewed, dense)
            )
            terms = wanted.exp() * (wanted - found)
            total += float(torch.where(wanted.isneginf(), 0.0, terms).double().sum())
            tokens += given.shape[1]
    return total / tokens
