"""Experts that share one 3-D parameter: each is pruned by the tokens that are routed to it.

An expert that saw fewer tokens than it has inputs would have a singular Gram matrix. It is shown,
besides its own, the first tokens that went elsewhere, until it has as many as inputs: its statistic
shades over into that of the whole layer the rarer it is.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn import functional

from endor.pruning.activations import Activations
from endor.pruning.contract import Statistics
from endor.pruning.stacks import GRAM_BYTES
from endor.pruning.statistics import moment

Item = TypeVar("Item")


def is_plain(module: Any) -> bool:
    """Whether `module` holds routed experts as gate, up and down of `down(act(gate) * up)`.

    Their statistics take one forward for each of the two stacked parameters, and rare experts can
    be shown the tokens of others. `endor.pruning.stacks` knows experts of any other form.
    """
    return (
        isinstance(getattr(module, "down_proj", None), nn.Parameter)
        and hasattr(module, "gate_up_proj")
        and not getattr(module, "is_transposed", False)
        and not getattr(module, "has_bias", False)
        and getattr(module, "has_gate", True)
        and callable(getattr(module, "act_fn", None))
        and "top_k_index" in inspect.signature(type(module).forward).parameters
    )


class RoutedTokens:
    """The inputs of an experts module over all calibration tokens, and where each was routed.

    Args:
        tokens: Room for `(batches, tokens of a batch, features)`.
        experts: How many there are.
    """

    def __init__(self, tokens: Activations, experts: int) -> None:
        self._tokens = tokens
        self._experts = experts
        self._routes: list[torch.Tensor] = []

    def add(self, hidden: torch.Tensor, routes: torch.Tensor) -> None:
        """Append one batch: hidden `(tokens, features)`, routes `(tokens, experts per token)`."""
        missing = self._tokens.shape[1] - len(hidden)  # the last batch may be short
        self._tokens.write(len(self._routes), functional.pad(hidden, (0, 0, 0, missing))[None])
        self._routes.append(routes.cpu())

    def close(self) -> None:
        """Give up the tokens."""
        self._tokens.close()

    def chosen(self, expert: int, least: int) -> list[torch.Tensor]:
        """Return, for each batch, the indices of the tokens that `expert` is shown."""
        own = [(routes == expert).any(-1) for routes in self._routes]
        wanting = least - sum(int(mask.sum()) for mask in own)
        chosen = []
        for mask in own:
            if wanting > 0:
                others = (~mask).nonzero().squeeze(1)[:wanting]
                wanting -= len(others)
                mask = mask.clone()
                mask[others] = True
            chosen.append(mask.nonzero().squeeze(1))
        return chosen

    def statistics(
        self,
        least: int,
        kind: Statistics,
        inputs: Callable[[int, torch.Tensor], torch.Tensor],
        width: int,
        device: torch.device,
        use: Callable[[int, torch.Tensor], None],
    ) -> None:
        """Call `use(expert, mean statistic)` for every expert.

        Args:
            least: Tokens that an expert is shown at least.
            kind: "diagonal" or "gram".
            inputs: From an expert's number and hidden states to what its matrix is given.
            width: Features of `inputs`.
            device: Where to compute.
            use: Takes the statistic; may prune the expert at once.
        """
        each = 4 * width * (width if kind == "gram" else 1)
        step = max(1, GRAM_BYTES // each)
        for first in range(0, self._experts, step):
            group = range(first, min(first + step, self._experts))
            chosen = {expert: self.chosen(expert, least) for expert in group}
            sums: dict[int, torch.Tensor] = {}
            for batch in range(len(self._routes)):
                hidden = self._tokens.read(batch, batch + 1)[0].to(device)
                for expert in group:
                    rows = chosen[expert][batch].to(device)
                    if len(rows):
                        found = moment(inputs(expert, hidden[rows]), kind)
                        sums[expert] = sums[expert] + found if expert in sums else found
            for expert in group:
                use(expert, sums[expert] / max(1, sum(len(rows) for rows in chosen[expert])))


def renew_experts(
    module: Any,
    tokens: RoutedTokens,
    kind: Statistics,
    matrices: Mapping[str, Sequence[Sequence[Item]]],
    renew: Callable[[Item, torch.Tensor], None],
) -> None:
    """Renew gate and up of all experts, then down on what the new gate and up give it.

    Args:
        module: The experts.
        tokens: What they were given.
        kind: "diagonal" or "gram".
        matrices: For "gate_up_proj" and "down_proj", for each expert, those to renew.
        renew: Takes one, and the statistic of its inputs.
    """
    hidden, inner = module.gate_up_proj.shape[2], module.down_proj.shape[2]
    device = module.down_proj.device
    least = max(hidden, inner)

    def inner_inputs(expert: int, given: torch.Tensor) -> torch.Tensor:
        gate, up = functional.linear(given, module.gate_up_proj[expert]).chunk(2, dim=-1)
        activated: torch.Tensor = module.act_fn(gate) * up
        return activated

    def use(parameter: str) -> Callable[[int, torch.Tensor], None]:
        def renew_all(expert: int, statistic: torch.Tensor) -> None:
            for matrix in matrices[parameter][expert]:
                renew(matrix, statistic)

        return renew_all

    tokens.statistics(least, kind, lambda _, given: given, hidden, device, use("gate_up_proj"))
    tokens.statistics(least, kind, inner_inputs, inner, device, use("down_proj"))
