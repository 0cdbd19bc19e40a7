"""Gated blocks whose activation is exactly zero: what its zeros are multiplied by is not computed.

In `down(act(gate(x)) * up(x))` a row of `up` adds nothing where `act(gate(x))` is 0, as it is for
most neurons behind ReLU. `act` is known before `up` is multiplied, so that these rows need not be:
the result is the same, for finite weights and inputs.
"""

import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import nn

from endor.hf.linear import EndorLinear
from endor.kernels.neurons import active_neurons
from endor.packed import bits_of

_PARTS = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"))
"""Names of the three matrices of a gated block; what they do is tried, whatever they are called."""

LEAST_ZEROS = 0.25
"""Share of a normal draw that an activation must make exactly 0: ReLU does so with half of it."""

_ACTS = ("act_fn", "activation_fn", "act", "activation")


class GateZeros:
    """Watches one gated block: says which rows of `up` meet no zero.

    What was seen holds inside one call of the block, on its thread and for its input: products that
    are taken for several generations together have other inputs, and take all rows.
    """

    lossy = False

    def __init__(self) -> None:
        self._seen = threading.local()

    def watch(self, block: nn.Module, act: nn.Module) -> None:
        """Watch the calls of a block and of its activation."""
        block.register_forward_pre_hook(self._begin)
        act.register_forward_hook(self._note)
        block.register_forward_hook(self._end, always_call=True)

    def rows(self, input: torch.Tensor) -> np.ndarray | None:
        """Return the rows of `up` that are not multiplied by zero; None where it is not known."""
        seen = self._seen.__dict__
        out = seen.get("out")
        if out is None or seen.get("input") is not input:
            return None
        return active_neurons(bits_of(out.reshape(-1, out.shape[-1]).contiguous()))

    def _begin(self, _block: nn.Module, args: tuple[Any, ...]) -> None:
        if not torch.compiler.is_compiling():
            self._seen.__dict__.update(input=args[0] if args else None, out=None)

    def _note(self, _act: nn.Module, _args: tuple[Any, ...], out: torch.Tensor) -> None:
        if not torch.compiler.is_compiling() and self._seen.__dict__.get("input") is not None:
            self._seen.out = out.detach()

    def _end(self, *_: Any) -> None:
        if not torch.compiler.is_compiling():
            self._seen.__dict__.clear()

    def __deepcopy__(self, memo: dict[int, Any]) -> "GateZeros":
        made = memo[id(self)] = GateZeros()
        return made


def skip_gated(model: nn.Module) -> int:
    """Have the gated blocks of a model skip what is multiplied by zero; return how many do.

    Those on the processor whose products need not be exact, and whose code was tried: with other
    values for its matrices it must give `down(act(gate(x)) * up(x))`, and 0 where `act` is 0.
    """
    count = 0
    for block, parts, act in _candidates(model):
        up = parts[1]
        if up.exact or not up.source.takes_rows or up.choice is not None:
            continue
        if _behaves(block, parts, act):
            zeros = GateZeros()
            zeros.watch(block, act)
            up.choice = zeros
            count += 1
    return count


def _candidates(
    model: nn.Module,
) -> Iterator[tuple[nn.Module, tuple[EndorLinear, EndorLinear, EndorLinear], nn.Module]]:
    for block in model.modules():
        children = dict(block.named_children())
        acts = [children[name] for name in _ACTS if name in children]
        for names in _PARTS:
            gate, up, down = (children.get(name) for name in names)
            if (
                isinstance(gate, EndorLinear)
                and isinstance(up, EndorLinear)
                and isinstance(down, EndorLinear)
                and len(acts) == 1
                and gate.out_features == up.out_features == down.in_features
            ):
                yield block, (gate, up, down), acts[0]


def _behaves(
    block: nn.Module, parts: tuple[EndorLinear, EndorLinear, EndorLinear], act: nn.Module
) -> bool:
    """Whether a block is gated as thought, found out with other matrices in place of its own."""
    gate, up, down = parts
    width, dtype = up.out_features, up.weight_dtype
    draws = torch.Generator().manual_seed(0)

    def drawn(size: int) -> torch.Tensor:
        return torch.randn(1, 1, size, generator=draws).to(dtype)

    x, given, made = drawn(up.in_features), drawn(width), drawn(down.out_features)
    order: list[Any] = []
    hidden: list[torch.Tensor] = []

    def stand_in(name: str, value: torch.Tensor, seen: list[Any]) -> Any:
        def forward(input: torch.Tensor) -> torch.Tensor:
            order.append((name, input is x))
            seen.append(input)
            return value

        return forward

    handle = act.register_forward_hook(lambda _act, args, _out: order.append(("act", args[0])))
    try:
        with torch.no_grad():
            for _ in range(2):  # with other factors each time
                gate.__dict__["forward"] = stand_in("gate", given, [])
                up.__dict__["forward"] = stand_in("up", drawn(width), [])
                down.__dict__["forward"] = stand_in("down", made, hidden)
                out = block(x)
                if out is not made or len(hidden) != len(order) // 4:
                    return False
            zero = act(given) == 0
    except Exception:  # whatever the code of a model says to what it does not expect
        return False
    finally:
        handle.remove()
        for part in parts:
            part.__dict__.pop("forward", None)
    names = [name for name, _ in order[:8]]
    if names != ["gate", "act", "up", "down"] * 2:
        return False
    asked = all(same for name, same in order if name in ("gate", "up"))
    acted = all(seen is given for name, seen in order[:8] if name == "act")
    one, two = hidden
    still = bool((one[zero] == 0).all() and (two[zero] == 0).all())
    many = float(zero.float().mean()) >= LEAST_ZEROS
    return asked and acted and still and many and not torch.equal(one, two)
