"""Re-training a pruned layer's survivors so that it does again what the dense layer did.

After the mask is found, the survivors of all matrices of one decoder layer are trained together:
the pruned layer, on the inputs it really gets (from pruned layers before it), must give the outputs
of the dense layer on dense inputs. The error of the layers before is thus corrected as well. Only
one matrix's gradient exists at a time, so this streams like everything else. The idea of matching
dense block outputs is that of BESA (arXiv 2402.16880) and Wanda++ (arXiv 2503.04992).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from endor.pruning.activations import Activations, batches
from endor.pruning.heap import reused_blocks
from endor.pruning.layer import Matrix
from endor.pruning.skeleton import Call

BATCH_TOKENS = 1024
"""Tokens of a step: small, because steps count for more than their precision."""


@dataclass(frozen=True, slots=True)
class Schedule:
    """How long and how fast the survivors are trained.

    Attributes:
        passes: How often the calibration windows are gone over.
        rate: Adam's step at its largest, relative to the root mean square of a parameter's
            survivors: weights of different models and matrices differ in scale.
        warmup: Steps over which the rate rises; then it falls as a cosine.
    """

    passes: int
    rate: float = 0.03
    warmup: int = 4


def finetune(
    layer: nn.Module,
    call: Call,
    inputs: Activations,
    targets: Activations,
    windows: int,
    matrices: Sequence[Matrix],
    seed: int,
    schedule: Schedule,
    dtype: torch.dtype,
) -> None:
    """Train the non-zero elements of `matrices` in place; zeros stay zero.

    Args:
        layer: The decoder layer that holds `matrices`.
        call: How the model calls it.
        inputs: Hidden states before it, from the pruned model.
        targets: Hidden states after it, from the dense model.
        windows: How many there are.
        matrices: Its pruned matrices; what else their parameters hold stays as it is.
        seed: Orders the batches.
        schedule: See `Schedule`.
        dtype: What the layer's products are computed in; weights and optimizer stay in float32.
    """
    spans = list(batches(windows, max(1, BATCH_TOKENS // inputs.shape[1])))
    steps = schedule.passes * len(spans)
    parameters = list({id(matrix.parameter): matrix.parameter for matrix in matrices}.values())
    masks = _masks(parameters, matrices)
    device = parameters[0].device
    generator = torch.Generator().manual_seed(seed)
    order = [
        spans[at]
        for _ in range(schedule.passes)
        for at in torch.randperm(len(spans), generator=generator).tolist()
    ]
    updates = [
        _Update(parameter, mask, schedule.rate)
        for parameter, mask in zip(parameters, masks, strict=True)
    ]
    try:
        with torch.enable_grad(), reused_blocks():
            for step, (start, stop) in enumerate(order):
                warm = min(1.0, (step + 1) / schedule.warmup)
                fall = (1 + math.cos(math.pi * step / steps)) / 2
                for update in updates:
                    update.pace(warm, fall)
                wanted = targets.read(start, stop).to(device)
                with autocast(device, dtype):
                    found = call.run(layer, inputs.read(start, stop).to(device))
                loss = token_loss(found.float(), wanted)
                loss.backward()  # type: ignore[no-untyped-call]
    finally:
        for update in updates:
            update.close()


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """Return a context in which a float32 layer computes its products in `dtype`."""
    narrow = dtype != torch.float32
    return torch.autocast(device.type, dtype if narrow else torch.bfloat16, enabled=narrow)


class _Update:
    """Adam on the survivors of one parameter, as soon as their gradient is there.

    The gradient is given up at once: of a layer's gradients only one exists at a time.

    Args:
        parameter: Changed in place by every backward until `close`.
        mask: What of it may change; the gradient elsewhere is set to zero, and so Adam's step is
            zero exactly.
        rate: The step, relative to the root mean square of what may change.
    """

    def __init__(self, parameter: nn.Parameter, mask: torch.Tensor, rate: float) -> None:
        self._parameter = parameter
        self._mask = mask
        self._rate = rate * _scale(parameter, mask)
        parameter.requires_grad_(True)
        self._optimizer = torch.optim.Adam(
            [parameter], lr=self._rate, betas=(0.9, 0.95), fused=True
        )
        hooked = parameter.register_post_accumulate_grad_hook
        self._hook = hooked(self._step)  # type: ignore[no-untyped-call]

    def pace(self, warm: float, fall: float) -> None:
        """Set the next step to these two shares of the largest."""
        self._optimizer.param_groups[0]["lr"] = self._rate * warm * fall

    def close(self) -> None:
        """Leave the parameter as it was found, but for its values."""
        self._hook.remove()
        self._parameter.requires_grad_(False)
        self._parameter.grad = None

    def _step(self, parameter: torch.Tensor) -> None:
        assert parameter.grad is not None
        parameter.grad.mul_(self._mask)
        self._optimizer.step()
        parameter.grad = None


def token_loss(found: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Return how far hidden states `(windows, tokens, features)` are from wanted ones, a scalar.

    Each token's squared error relative to the square of its wanted length, weighted by how many
    times the median that length is. Without the division the few tokens with massive activations
    (arXiv 2402.17762) would decide alone; without the weight they would be lost among the many, and
    with them what the attention of the layers behind leans on.
    """
    norm: torch.Tensor = torch.linalg.vector_norm(wanted, dim=-1).clamp_min(1e-6)
    error = (found - wanted).square().sum(-1)
    return (error / (norm * norm.median())).mean()


def _scale(parameter: torch.Tensor, mask: torch.Tensor) -> float:
    """Return the root mean square of the elements in `mask`."""
    square = float(parameter.detach().square().mul_(mask).sum())
    return math.sqrt(square / max(1, int(mask.sum())))


def _masks(parameters: Sequence[nn.Parameter], matrices: Sequence[Matrix]) -> list[torch.Tensor]:
    """Return what may change of each parameter: the survivors of the matrices in it."""
    masks = {
        id(parameter): torch.zeros_like(parameter, dtype=torch.bool) for parameter in parameters
    }
    for matrix in matrices:
        view = matrix.piece.view(masks[id(matrix.parameter)])
        view.copy_(matrix.piece.view(matrix.parameter) != 0)
    return [masks[id(parameter)] for parameter in parameters]
