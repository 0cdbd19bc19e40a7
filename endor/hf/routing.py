"""Routers of a model, and what the next one will choose, guessed from this layer's input."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

ROUTERS = ("gate", "router")
"""What transformers calls a router beside its `experts`."""


@dataclass(frozen=True, slots=True)
class Router:
    """The router of one layer.

    Attributes:
        name: Name of the module that holds router and experts.
        module: The router; its output has the chosen experts in an integer tensor.
        experts: What it routes to.
    """

    name: str
    module: nn.Module
    experts: nn.Module

    def choose(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Return the experts that the router would choose, `(tokens, top_k)`, int64.

        Does not run the module's hooks, so that nothing else notices.

        Args:
            hidden_states: `(tokens, hidden)`.
        """
        with torch.no_grad():
            found = _indices(type(self.module).forward(self.module, hidden_states))
        assert found is not None, "probed when the router was found"
        return found


def routers(model: nn.Module) -> Iterator[Router]:
    """Yield the routers of a model that can be asked for a guess, in execution order.

    Layers whose router is something else than a function of the hidden states are left out.
    """
    for name, module in model.named_modules():
        experts = getattr(module, "experts", None)
        if not isinstance(experts, nn.Module):
            continue
        for leaf in ROUTERS:
            router = getattr(module, leaf, None)
            if isinstance(router, nn.Module) and _answers(router):
                yield Router(name, router, experts)
                break


def _answers(router: nn.Module) -> bool:
    """Whether a router turns hidden states into a choice; tried on zeros."""
    weight = getattr(router, "weight", None)
    if not isinstance(weight, torch.Tensor) or weight.dim() != 2 or weight.is_meta:
        return False
    probe = torch.zeros((1, weight.shape[1]), dtype=weight.dtype, device=weight.device)
    try:
        with torch.no_grad():
            return _indices(type(router).forward(router, probe)) is not None
    except Exception:  # a router of another kind: there are no guesses for its layer
        return False


def _indices(output: Any) -> torch.Tensor | None:
    """Return the integer matrix in a router's output."""
    for item in output if isinstance(output, tuple) else (output,):
        if isinstance(item, torch.Tensor) and item.dim() == 2 and item.dtype == torch.int64:
            return item
    return None
