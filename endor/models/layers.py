"""The modules of a transformers model: its decoder layers, and what multiplies by its weights."""

from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.nn.modules.conv import _ConvNd


def is_linear(module: nn.Module) -> bool:
    """Whether a module is `nn.Linear` in all that it does."""
    return isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward


def is_own(module: nn.Module) -> bool:
    """Whether a module is of a model's own class, or a linear layer of some kind.

    Convolutions and embeddings use their weights otherwise than to multiply by them, and torch's
    other modules reach around their attributes.
    """
    if isinstance(module, nn.Linear):
        return True
    others = (nn.Embedding, nn.EmbeddingBag, nn.Bilinear, nn.MultiheadAttention, _ConvNd)
    return not isinstance(module, others) and not type(module).__module__.startswith("torch.")


def layer_list(model: Any, count: int) -> tuple[str, nn.ModuleList] | None:
    """Return the name of the list of `count` layers, and the list; None when there is none.

    Of several lists as long, that of the text decoder: a tower for images can have as many layers.
    """
    found = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count
    ]
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
    within = {id(module) for module in decoder.modules()} if decoder is not None else set()
    found.sort(key=lambda item: id(item[1]) not in within)
    return found[0] if found else None


def largest_list(model: nn.Module, nbytes: Mapping[str, int]) -> tuple[str, int] | None:
    """Return the name and length of the list of layers that holds most of the model.

    Args:
        model: Of any kind.
        nbytes: Bytes per module name.
    """
    lists = [
        (sum(nbytes.get(f"{name}.{at}", 0) for at in range(len(module))), name, len(module))
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
    ]
    return max(lists)[1:] if lists else None
