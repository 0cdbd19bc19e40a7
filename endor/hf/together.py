"""One packed layer asked by several generations: its weight is brought and expanded once."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from endor.hf.experts import EndorExperts, routes_tokens
from endor.hf.linear import EndorLinear
from endor.hf.packed_layer import PackedLayer
from endor.offload.weight import Weight


@dataclass(slots=True)
class Call:
    """What one generation asks of a layer, and what came of it.

    Attributes:
        args: Positional arguments of `forward`.
        kwargs: Its others.
        result: What it returned.
        error: What it raised; None if nothing.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)
    result: Any = None
    error: BaseException | None = None


def packed_layers(model: nn.Module) -> list[nn.Module]:
    """Return the modules of a model whose weights are packed."""
    kinds = (PackedLayer, EndorExperts)
    return [module for module in model.modules() if isinstance(module, kinds)]


def answer(layer: nn.Module, forward: Callable[..., Any], calls: Sequence[Call]) -> None:
    """Fill in what a packed layer makes of each call.

    An exact linear layer multiplies for each call by itself, so that a call's result has the bits
    that it has alone. Experts, and products straight from the packed form, take the rows of all
    calls together, whose sums may be of another order.

    Args:
        layer: One of `packed_layers`.
        forward: Its own `forward`.
        calls: Not empty. Errors are left in them.
    """
    rows = _stacked_rows(layer, calls) if len(calls) > 1 else None
    try:
        if rows is not None:
            columns = zip(*(call.args for call in calls), strict=True)
            joined = [torch.cat([_flat(layer, item) for item in column]) for column in columns]
            made = forward(*joined)
            if isinstance(made, torch.Tensor) and made.dim() == 2 and len(made) == sum(rows):
                for call, part in zip(calls, torch.split(made, rows), strict=True):
                    call.result = part.view(*call.args[0].shape[:-1], part.shape[-1])
                return
        _one_by_one(layer, forward, calls)
    except BaseException as error:
        for call in calls:
            call.error = error


def _one_by_one(layer: nn.Module, forward: Callable[..., Any], calls: Sequence[Call]) -> None:
    weight = layer.__dict__.get("_source") if len(calls) > 1 else None
    if weight is not None:
        layer.__dict__["_source"] = _Expanded(weight)
    try:
        for call in calls:
            try:
                call.result = forward(*call.args, **call.kwargs)
            except Exception as error:
                call.error = error
    finally:
        if weight is not None:
            layer.__dict__["_source"] = weight


def _stacked_rows(layer: nn.Module, calls: Sequence[Call]) -> list[int] | None:
    """Return how many rows each call has where one call may take all of them, else None."""
    first = calls[0].args
    if isinstance(layer, EndorExperts):
        alike = routes_tokens(type(layer).__mro__[2]) and len(first) == 3
    else:
        alike = type(layer) is EndorLinear and not layer.exact and len(first) == 1
    for call in calls:
        alike = (
            alike
            and not call.kwargs
            and len(call.args) == len(first)
            and all(isinstance(item, torch.Tensor) for item in call.args)
            and all(
                (one.dtype, one.device, one.shape[-1])
                == (other.dtype, other.device, other.shape[-1])
                for one, other in zip(call.args, first, strict=True)
            )
        )
        if not alike:
            return None
    rows = [call.args[0].numel() // call.args[0].shape[-1] for call in calls]
    if isinstance(layer, EndorExperts) and any(
        len(item) != count for call, count in zip(calls, rows, strict=True) for item in call.args
    ):
        return None
    return rows


def _flat(layer: nn.Module, item: torch.Tensor) -> torch.Tensor:
    return item if isinstance(layer, EndorExperts) else item.reshape(-1, item.shape[-1])


class _Expanded:
    """Stands for a weight whose expansion in scratch memory is kept for the next call."""

    def __init__(self, weight: Weight) -> None:
        self._weight = weight
        self._dense: torch.Tensor | None = None

    def dense(self, *, hold: bool = False) -> torch.Tensor:
        """Return the expanded weight."""
        if self._dense is None:
            self._dense = self._weight.dense(hold=hold)
        return self._dense

    def __getattr__(self, name: str) -> Any:
        return getattr(self._weight, name)
