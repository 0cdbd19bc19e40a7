"""The modules of a transformers model: its decoder layers, and what multiplies by its weights."""

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
