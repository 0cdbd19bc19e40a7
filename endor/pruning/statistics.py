"""What the inputs of a layer's matrices look like: mean x² or mean x xᵀ over all tokens."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn

from endor.pruning.contract import Statistics
from endor.pruning.heap import reused_blocks


class StopLayer(Exception):
    """The rest of a layer's forward is not needed."""


def moment(inputs: torch.Tensor, kind: Statistics) -> torch.Tensor:
    """Return the sum over tokens of x² `(features,)` or x xᵀ `(features, features)`, float32."""
    with torch.autocast(inputs.device.type, enabled=False):
        return inputs.T @ inputs if kind == "gram" else inputs.square().sum(0)


def neutral(features: int, kind: Statistics, device: torch.device) -> torch.Tensor:
    """Return the statistic by which all inputs count the same."""
    found = torch.eye if kind == "gram" else torch.ones
    return found(features, device=device)


def input_groups(
    modules: dict[str, nn.Module], run: Callable[[], None]
) -> tuple[tuple[str, ...], ...]:
    """Return the names of modules that are given the same tensor, in the order of their calls.

    q, k and v are one group, gate and up another. Modules that `run` does not reach come last, each
    by itself.
    """
    groups: list[list[str]] = []
    seen: dict[int, tuple[torch.Tensor, list[str]]] = {}  # holds the tensors: an id is used once

    def watch(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(_module: nn.Module, args: tuple[Any, ...]) -> None:
            if any(name in group for group in groups):
                return
            if id(args[0]) not in seen:
                groups.append([])
                seen[id(args[0])] = (args[0], groups[-1])
            seen[id(args[0])][1].append(name)

        return hook

    _with_hooks(modules, watch, run)
    reached = {name for group in groups for name in group}
    groups += [[name] for name in modules if name not in reached]
    return tuple(tuple(group) for group in groups)


def collect(
    modules: dict[str, nn.Module],
    leaders: Sequence[str],
    batches: Iterable[Callable[[], None]],
    kind: Statistics,
    *,
    stop: bool,
) -> dict[str, torch.Tensor]:
    """Return the mean statistic of the input of each of `leaders` that any batch reaches.

    Args:
        modules: By name.
        leaders: One name of each group.
        batches: Functions that run the layer on one batch.
        kind: "diagonal" or "gram".
        stop: Whether the layer need not run on after the last leader.
    """
    sums: dict[str, torch.Tensor] = {}
    tokens: dict[str, int] = {}

    def watch(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(_module: nn.Module, args: tuple[Any, ...]) -> None:
            inputs = args[0].reshape(-1, args[0].shape[-1]).float()
            found = moment(inputs, kind)
            sums[name] = found if name not in sums else sums[name].add_(found)
            tokens[name] = tokens.get(name, 0) + len(inputs)
            if stop and name == leaders[-1]:
                raise StopLayer

        return hook

    def run_all() -> None:
        for batch in batches:
            try:
                batch()
            except StopLayer:
                continue

    with reused_blocks():
        _with_hooks({name: modules[name] for name in leaders}, watch, run_all)
    return {name: total / max(tokens[name], 1) for name, total in sums.items()}


def _with_hooks(
    modules: dict[str, nn.Module],
    watch: Callable[[str], Callable[[nn.Module, tuple[Any, ...]], None]],
    run: Callable[[], None],
) -> None:
    handles = [module.register_forward_pre_hook(watch(name)) for name, module in modules.items()]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
