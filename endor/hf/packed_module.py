"""A module that multiplies by its `weight` in a way of its own, with the weight packed.

Subclasses of `nn.Linear` with another `forward` (Falcon's), `Conv1D` (GPT-2's), a router or any
other module of a model's own class: its code runs as it is, and finds the expanded weight under
the attribute's name.
"""

import threading
from typing import Any

import torch
from torch import nn

from endor.dependencies import internals
from endor.hf.compiling import outside_graphs
from endor.hf.packed_layer import PackedLayer, refuse_write

_running = threading.local()


class EndorModule(PackedLayer):
    """Mixed into a module's class: its code runs as it is on the expanded weight."""

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
        inside = getattr(_running, "module", None) is self
        if inside and self.__dict__["_endor_linear"] and not torch.is_grad_enabled():
            return self.source.dense()
        return super().weight

    @weight.setter
    def weight(self, value: Any) -> None:
        refuse_write()


def pack_module(module: nn.Module, dtype: torch.dtype) -> None:
    """Turn a module into an `EndorModule`, its parameter `weight` taken away."""
    (conv,) = internals("transformers.pytorch_utils", "Conv1D")
    parameter = module._parameters.pop("weight")
    assert parameter is not None
    module.__dict__["_endor_linear"] = isinstance(module, (nn.Linear, conv))
    module.__class__ = _class_of(type(module))
    assert isinstance(module, EndorModule)
    module.hold(parameter.shape, dtype)


def _class_of(base: type[nn.Module]) -> type[nn.Module]:
    if base not in _CLASSES:
        _CLASSES[base] = type(f"Endor{base.__name__}", (EndorModule, base), {})
    return _CLASSES[base]


_CLASSES: dict[type[nn.Module], type[nn.Module]] = {}
