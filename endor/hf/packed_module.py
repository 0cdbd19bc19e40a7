"""A module that multiplies by its `weight` in a way of its own, with the weight packed.

Subclasses of `nn.Linear` with another `forward` (Falcon's), `Conv1D` (GPT-2's), a router or any
other module of a model's own class: its code runs as it is, and finds the expanded weight under
the attribute's name.
"""

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from endor.dependencies import internals
from endor.hf.compiling import outside_graphs
from endor.hf.linear import (
    PackedWeight,
    initialised,
    refuse_conversion,
    refuse_packed_keys,
    refuse_write,
    unbound,
)
from endor.offload.store import Weight

_running = threading.local()


class EndorModule(nn.Module):
    """Mixed into a module's class: `weight` is expanded when it is asked for."""

    @outside_graphs
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        outer = getattr(_running, "module", None)
        _running.module = self
        try:
            return super().forward(*args, **kwargs)
        finally:
            _running.module = outer

    @property
    def weight(self) -> torch.Tensor:
        """The dense weight, read-only.

        In the forward pass of a linear layer without gradients it lies in scratch memory; in
        memory of its own for all others, who may keep it.
        """
        source: Weight | None = self.__dict__["_endor_source"]
        if source is None:
            return initialised(self.__dict__["_endor_shape"], self.__dict__["_endor_dtype"])
        scratch = (
            getattr(_running, "module", None) is self
            and self.__dict__["_endor_linear"]
            and not torch.is_grad_enabled()
        )
        return source.dense() if scratch else source.fresh().as_subclass(PackedWeight)

    @property
    def source(self) -> Weight:
        """Where the weight comes from.

        Raises:
            ConfigError: The module was not bound to a packed checkpoint.
        """
        source: Weight | None = self.__dict__["_endor_source"]
        if source is None:
            raise unbound()
        return source

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight":
            refuse_write()
        super().__setattr__(name, value)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        refuse_packed_keys(state_dict, [f"{prefix}weight"])
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        source: Weight | None = self.__dict__["_endor_source"]
        device = torch.device("cpu") if source is None else source.device
        refuse_conversion(fn, self.__dict__["_endor_dtype"], device)
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]


def pack_module(module: nn.Module, dtype: torch.dtype) -> None:
    """Turn a module into an `EndorModule`, its parameter `weight` taken away."""
    (conv,) = internals("transformers.pytorch_utils", "Conv1D")
    parameter = module._parameters.pop("weight")
    assert parameter is not None
    module.__dict__.update(
        _endor_source=None,
        _endor_shape=parameter.shape,
        _endor_dtype=dtype,
        _endor_linear=isinstance(module, (nn.Linear, conv)),
    )
    module.__class__ = _class_of(type(module))
    module._is_hf_initialized = True  # type: ignore[assignment]


def bind_module(module: EndorModule, source: Weight) -> None:
    """Set where a packed module's weight comes from."""
    module.__dict__["_endor_source"] = source


def _class_of(base: type[nn.Module]) -> type[nn.Module]:
    if base not in _CLASSES:
        _CLASSES[base] = type(f"Endor{base.__name__}", (EndorModule, base), {})
    return _CLASSES[base]


_CLASSES: dict[type[nn.Module], type[nn.Module]] = {}
