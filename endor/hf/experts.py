"""Fused experts whose weights stay packed: only the experts that tokens are routed to are used."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from endor.errors import ConfigError
from endor.hf.compiling import outside_graphs
from endor.hf.linear import fast_product
from endor.hf.lossy_experts import near_choice, router_logits
from endor.hf.packed_layer import initialised, refuse_conversion, refuse_packed_keys
from endor.hf.routing import Router, routers
from endor.models.nested import map_nested
from endor.offload.state import State
from endor.offload.weight import Weight
from endor.planning.products import NEVER, PRODUCT_ROWS
from endor.planning.workload import no_experts


class ExpertStack:
    """What stands in for a 3-D parameter `(experts, rows, cols)`: indexing it expands one expert.

    The result lies in scratch memory, valid until the thread expands another weight; with
    gradients enabled, and where `own_memory` says so, in memory of its own.

    Args:
        weights: Each expert's matrix, as stored.
        exact: Never hand out a matrix that `F.linear` multiplies packed.
        transposed: What is stored is the transpose of what the module multiplies by.
        own_memory: The module is not known to use one expert at a time: an expert's matrix stays
            valid, and whatever else asks for the whole parameter gets it.
    """

    def __init__(
        self,
        weights: Sequence[Weight],
        *,
        exact: bool,
        transposed: bool = False,
        own_memory: bool = False,
    ) -> None:
        self.weights = tuple(weights)
        self.exact = exact
        self.transposed = transposed
        self.own_memory = own_memory
        first = self.weights[0]
        rows, cols = reversed(first.shape) if transposed else first.shape
        self.shape = torch.Size((len(self.weights), rows, cols))
        self.dtype = first.dtype
        self.device = first.device

    def __len__(self) -> int:
        return len(self.weights)

    def __getitem__(self, index: int | torch.Tensor) -> "torch.Tensor | PackedMatrix":
        if not isinstance(index, int) and (
            not isinstance(index, torch.Tensor) or index.numel() != 1
        ):
            if self.own_memory:
                return self.whole()[index]
            raise ConfigError(
                "packed experts are used one at a time: load the model with "
                "experts_implementation='eager'"
            )
        weight = self.weights[int(index)]
        if self.transposed or torch.is_grad_enabled():
            return self._matrix(int(index))
        if self.own_memory:
            return weight.fresh(hold=True)
        if not self.exact and (weight.product_rows or weight.wide_rows < NEVER):
            return PackedMatrix(weight)
        return weight.dense(hold=True)

    def _matrix(self, expert: int) -> torch.Tensor:
        """Return one expert's matrix; without gradients, which keep it, it may be scratch."""
        weight = self.weights[expert]
        found = (weight.fresh if torch.is_grad_enabled() else weight.dense)(hold=True)
        turned = torch.contiguous_format
        return found.t().clone(memory_format=turned) if self.transposed else found

    def whole(self) -> torch.Tensor:
        """Return all experts, expanded, in memory of their own."""
        out = torch.empty(self.shape, dtype=self.dtype, device=self.device)
        for expert in range(len(self)):
            out[expert] = self._matrix(expert)
        return out

    def _batched(self, input: torch.Tensor) -> torch.Tensor:
        """Return `torch.bmm(input, self)`, one expert expanded at a time."""
        products = [
            torch.bmm(input[expert : expert + 1], self._matrix(expert).unsqueeze(0))
            for expert in range(len(self))
        ]
        return torch.cat(products)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or not self.__dict__.get("own_memory"):
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        return getattr(self.whole(), name)

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        stack = args[1] if func is torch.bmm and len(args) == 2 and not kwargs else None
        if isinstance(stack, cls) and stack.own_memory:
            return stack._batched(args[0])

        def expanded(item: Any) -> Any:
            if not isinstance(item, cls):
                return item
            if not item.own_memory:
                raise _one_at_a_time(func)
            return item.whole()

        return func(*map_nested(expanded, tuple(args)), **map_nested(expanded, dict(kwargs or {})))


def _one_at_a_time(func: Callable[..., Any]) -> ConfigError:
    return ConfigError(
        f"packed experts are used one at a time, torch.{getattr(func, '__name__', func)} wants "
        "all of them: this architecture is not supported; unpack the checkpoint to run it"
    )


class PackedMatrix:
    """One expert's matrix: `F.linear` with few rows multiplies it packed, all else expands it."""

    def __init__(self, weight: Weight) -> None:
        self.weight = weight

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.linear and len(args) >= 2 and isinstance(args[1], cls):
            input, weight = args[0], args[1].weight
            bias = args[2] if len(args) > 2 else kwargs.get("bias")
            found = None
            if input.dtype == weight.dtype:
                found = fast_product(input, weight, hold=True)
            if found is not None:
                if bias is not None:
                    found += bias
                return found.to(input.dtype).view(*input.shape[:-1], weight.shape[0])
        expanded = [
            item.weight.dense(hold=True) if isinstance(item, cls) else item for item in args
        ]
        return func(*expanded, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.weight.dense(hold=True), name)


class EndorExperts(nn.Module):
    """Mixed into a fused experts class: runs that class's own eager loop over packed experts.

    The architecture keeps its activation, gating and biases; what changes is that indexing a
    weight by an expert fetches and expands that expert alone. Other experts implementations sum in
    another order, so results are bit-equal to `experts_implementation="eager"`.

    While this layer computes, experts that the next layer is likely to use are read: its router is
    asked with this layer's input, as in DAOP (arXiv 2501.10375). The guess only starts reads; what
    is computed is what that router chooses in its turn.
    """

    @outside_graphs
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        base = type(self).__mro__[2]
        if routes_tokens(base):
            return self._routed(*args, **kwargs)
        try:
            return super().forward(*args, **kwargs)
        finally:
            self._stacks[0].weights[0].mover.drop()

    def _routed(self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, *rest: Any) -> Any:
        stacks = self._stacks
        run = eager_forward(type(self).__mro__[2])
        mover = stacks[0].weights[0].mover
        if not mover.streams:
            return run(self, hidden_states, top_k_index, *rest)
        group, wanted = stacks[0].weights[0].states[0].unit.index, None
        router = self.__dict__.get("_endor_lossy")
        few = len(top_k_index) <= PRODUCT_ROWS and not torch.is_grad_enabled()
        # A module whose weights are of another shape than its choice keeps what it chose.
        if router is not None and few and rest and rest[0].shape == top_k_index.shape:
            wanted = self._states(top_k_index)
            near = [
                all(mover.near(state) for stack in stacks for state in stack.weights[at].states)
                for at in range(len(stacks[0]))
            ]
            found = near_choice(router_logits(router, hidden_states), near, top_k_index, rest[0])
            mover.ledger.counters.lossy_choices += top_k_index.numel()
            mover.ledger.counters.lossy_replaced += found.replaced
            top_k_index, rest = found.index, (found.weights, *rest[1:])
        mover.hint(self._states(top_k_index), group=group, wanted=wanted)
        following = self.__dict__.get("_endor_next")
        if following is not None and not torch.is_grad_enabled():
            guess = following.choose(hidden_states)
            mover.warm(following.experts._states(guess, by_count=True))
        try:
            return run(self, hidden_states, top_k_index, *rest)
        finally:
            mover.drop()

    def _states(self, top_k_index: torch.Tensor, *, by_count: bool = False) -> list[State]:
        """Return the units of the chosen experts in the order of use, or the most chosen first."""
        stacks = self._stacks
        chosen, counts = torch.unique(top_k_index, return_counts=True)
        if by_count:
            chosen = chosen[torch.argsort(counts, descending=True, stable=True)]
        order = chosen.tolist()
        return [
            state
            for expert in order
            if 0 <= expert < len(stacks[0])
            for stack in stacks
            for state in stack.weights[expert].states
        ]

    @property
    def _stacks(self) -> list[ExpertStack]:
        stacks: list[ExpertStack] = self.__dict__["_endor_stacks"]
        return stacks

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        names = self.__dict__.get("_endor_names", ())
        refuse_packed_keys(state_dict, [f"{prefix}{name}" for name in names])
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        refuse_conversion(fn, self._stacks[0].dtype, self._stacks[0].device)
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self.__dict__.get("_endor_names", ()):
            raise ConfigError(
                f"packed experts cannot be replaced ({name}): unpack the checkpoint to change "
                "its weights"
            )
        super().__setattr__(name, value)


def pack_experts(module: nn.Module, names: Sequence[str]) -> None:
    """Turn a fused experts module into an `EndorExperts`, its parameters `names` taken away."""
    module.__class__ = _experts_class(type(module))
    for name in names:
        parameter = module._parameters.pop(name)
        assert parameter is not None
        # While the model is built, its `_init_weights` may look at it.
        module.__dict__[name] = initialised(parameter.shape, parameter.dtype)
    module._is_hf_initialized = True  # type: ignore[assignment]


def bind_experts(module: EndorExperts, stacks: Mapping[str, ExpertStack]) -> None:
    """Set the stacks of packed experts, by parameter name."""
    for name, stack in stacks.items():
        module.__dict__[name] = stack
    module.__dict__["_endor_stacks"] = list(stacks.values())
    module.__dict__["_endor_names"] = frozenset(stacks)


def link_experts(model: nn.Module, *, lossy: bool = False) -> None:
    """Tell each layer of packed experts which router comes next, and its own where it is lossy.

    Raises:
        ConfigError: They shall be lossy, and there are none.
    """
    found: list[Router] = [
        router for router in routers(model) if isinstance(router.experts, EndorExperts)
    ]
    for router, following in pairwise(found):
        router.experts.__dict__["_endor_next"] = following
    if lossy and not found:
        raise no_experts()
    for router in found if lossy else ():
        router.experts.__dict__["_endor_lossy"] = router.module


def _experts_class(base: type[nn.Module]) -> type[nn.Module]:
    if base not in _CLASSES:
        _CLASSES[base] = type(f"Endor{base.__name__}", (EndorExperts, base), {})
    return _CLASSES[base]


_CLASSES: dict[type[nn.Module], type[nn.Module]] = {}


def routes_tokens(base: type[nn.Module]) -> bool:
    """Whether a class of experts was made with transformers' `use_experts_implementation`."""
    return inspect.unwrap(base.forward) is not base.forward


def eager_forward(base: type[nn.Module]) -> Callable[..., Any]:
    """Return the loop over experts of a fused class, beneath transformers' dispatch.

    Raises:
        ConfigError: The class has no such loop.
    """
    forward: Callable[..., Any] = inspect.unwrap(base.forward)
    if forward is base.forward:
        raise ConfigError(
            f"{base.__name__} has no loop over experts (it is not made with "
            "use_experts_implementation): unpack the checkpoint to run it"
        )
    return forward
