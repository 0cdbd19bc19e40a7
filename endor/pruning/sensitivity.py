"""How much the output of a layer changes when a matrix in it does: gradients of random probes."""

import torch
from torch import nn

from endor.pruning.activations import Activations
from endor.pruning.finetune import BATCH_TOKENS, autocast
from endor.pruning.heap import reused_blocks
from endor.pruning.layer import Matrix
from endor.pruning.skeleton import Call

PROBES = 2
"""Probes, on windows of their own where there are enough."""


def probe(
    layer: nn.Module,
    call: Call,
    inputs: Activations,
    windows: int,
    matrices: list[Matrix],
    seed: int,
    dtype: torch.dtype,
) -> dict[int, torch.Tensor]:
    """Return the gradient of each parameter of `matrices`, by its id, of random probes' sum.

    A probe is the product of the layer's output with random numbers, each token's divided as in
    `token_loss`. The mean square of its change is the loss that a small change of a matrix causes
    (Hutchinson's estimate), so that of a gradient is the sensitivity.

    Args:
        layer: The decoder layer that holds `matrices`.
        call: How the model calls it.
        inputs: Hidden states before it.
        windows: How many there are.
        matrices: What is asked about.
        seed: Of the random numbers.
        dtype: What the layer's products are computed in.
    """
    parameters = list({id(matrix.parameter): matrix.parameter for matrix in matrices}.values())
    device = parameters[0].device
    generator = torch.Generator().manual_seed(seed)
    each = max(1, BATCH_TOKENS // inputs.shape[1])
    for parameter in parameters:
        parameter.requires_grad_(True)
    try:
        with torch.enable_grad(), reused_blocks():
            for start in range(0, min(windows, each * PROBES), each):
                given = inputs.read(start, min(start + each, windows)).to(device)
                with autocast(device, dtype):
                    found = call.run(layer, given).float()
                norm = torch.linalg.vector_norm(found.detach(), dim=-1, keepdim=True)
                norm = norm.clamp_min(1e-6)
                random = torch.randn(found.shape, generator=generator).to(device)
                found.backward(random / (norm * norm.median()).sqrt())  # type: ignore[no-untyped-call]
        return {
            id(parameter): parameter.grad for parameter in parameters if parameter.grad is not None
        }
    finally:
        for parameter in parameters:
            parameter.requires_grad_(False)
            parameter.grad = None
