"""What a model needs besides its packed weights."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from endor.errors import ConfigError


@dataclass(frozen=True, slots=True)
class ModelShape:
    """What a model needs besides its units.

    Attributes:
        layers: Decoder layers.
        hidden: Width of the residual stream.
        heads: Attention heads.
        kv_bytes_per_token: Keys and values of one token in all layers.
        head_bytes: Dense output projection, multiplied once a token; 0 when it is a unit.
        other_bytes: All dense tensors outside the units.
        activation_bytes_per_token: Peak of intermediate results per token in flight.
        vocab: Output width.
        expert_use: Share of the experts that one token needs; 1 for a dense model.
        scratch_bytes: The largest expanded weight; 0 stands for the largest expanded unit.
        itemsize: Bytes of an element of an expanded weight; 0 stands for the stored ones.
    """

    layers: int
    hidden: int
    heads: int
    kv_bytes_per_token: int
    head_bytes: int
    other_bytes: int
    activation_bytes_per_token: int
    vocab: int
    expert_use: float = 1.0
    scratch_bytes: int = 0
    itemsize: int = 0

    @classmethod
    def from_config(
        cls,
        config: Mapping[str, Any],
        *,
        other_bytes: int,
        head_packed: bool,
        itemsize: int = 2,
        scratch_bytes: int = 0,
    ) -> "ModelShape":
        """Return the shape that a Hugging Face `config.json` describes.

        Args:
            config: The parsed file; a nested `text_config` is followed.
            other_bytes: Dense bytes of the tensors outside the units.
            head_packed: Whether the output projection is a unit.
            itemsize: Bytes of an activation, and of an element of an expanded weight.
            scratch_bytes: The largest expanded weight.

        Raises:
            ConfigError: The file lacks a size that planning needs.
        """
        text = config.get("text_config")
        inner = {**config, **text} if isinstance(text, Mapping) else config
        layers = _size(inner, "num_hidden_layers", "n_layer", "n_layers", "num_layers")
        hidden = _size(inner, "hidden_size", "n_embd", "d_model")
        heads = _size(inner, "num_attention_heads", "n_head", "num_heads")
        kv_heads = _most(inner.get("num_key_value_heads") or heads)
        head_dim = inner.get("head_dim") or hidden // heads
        vocab = _size(inner, "vocab_size")
        wide = _most(inner.get("intermediate_size") or inner.get("ffn_dim") or 4 * hidden)
        experts = _most(
            inner.get("num_local_experts")
            or inner.get("num_experts")
            or inner.get("n_routed_experts")
            or 0
        )
        chosen = _most(inner.get("num_experts_per_tok") or experts)
        return cls(
            layers=layers,
            hidden=hidden,
            heads=heads,
            kv_bytes_per_token=2 * layers * kv_heads * int(head_dim) * itemsize,
            head_bytes=0 if head_packed else vocab * hidden * itemsize,
            other_bytes=other_bytes,
            activation_bytes_per_token=(8 * hidden + 3 * wide) * itemsize,
            vocab=vocab,
            expert_use=min(1.0, chosen / experts) if experts else 1.0,
            scratch_bytes=scratch_bytes,
            itemsize=itemsize,
        )


def _most(value: Any) -> int:
    """Return a size that may be given for each layer: the largest."""
    return max(map(_most, value), default=0) if isinstance(value, list | tuple) else int(value)


def _size(config: Mapping[str, Any], *names: str) -> int:
    for name in names:
        value = config.get(name)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    raise ConfigError(f"config.json: planning needs one of {', '.join(names)}, found none")
