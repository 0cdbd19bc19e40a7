"""A transformers cache whose keys and values stay in host memory or in a file.

Each layer's are loaded while the layers before it run, and saved behind; see
`endor.offload.kv.store`. Attention gets the very tensors that transformers' `DynamicCache` gives.
"""

from typing import Any

import torch
from transformers.cache_utils import CacheLayerMixin, DynamicCache, DynamicLayer

from endor.errors import ConfigError, ShapeError
from endor.offload.kv.store import KVStore

AHEAD = 1
"""Layers whose keys and values are asked for while one runs."""


class EndorCache(DynamicCache):  # type: ignore[misc]
    """Keys and values of every layer that attends to all tokens, kept in a `KVStore`.

    Layers with a window, which keep little, and layers without attention are transformers' own.

    Args:
        config: The model's config.
        store: Where keys and values are kept; has as many layers as the model.
        whole: Keep all tokens of layers with a window, too, as assisted decoding wants before
            transformers 5.24.
    """

    def __init__(self, config: Any, store: KVStore, *, whole: bool = False) -> None:
        super().__init__(config=config)
        self.store = store
        layers: list[Any] = self.__dict__["layers"]
        self.layers = [
            EndorCacheLayer(store, at) if whole or type(layer) is DynamicLayer else layer
            for at, layer in enumerate(layers)
        ]

    def __deepcopy__(self, memo: dict[int, Any]) -> DynamicCache:
        """Return a plain cache with the same content."""
        out = DynamicCache()
        out.layers = []
        for layer in self.layers:
            copied = layer.plain() if isinstance(layer, EndorCacheLayer) else layer
            out.layers.append(copied)
        out.layer_class_to_replicate = None
        return out


class EndorCacheLayer(CacheLayerMixin):  # type: ignore[misc]
    """One layer of an `EndorCache`.

    A token's record holds its keys and values of the whole batch, sequences in the order in which
    they were when it was saved; `rows` says where each of the present sequences is.

    Args:
        store: Where records are kept.
        index: Number of the layer.
    """

    is_sliding = False
    is_croppable = True
    is_compileable = False

    def __init__(self, store: KVStore, index: int) -> None:
        self._store = store
        self._index = index
        self._shapes: tuple[tuple[int, ...], tuple[int, ...]] | None = None
        self._key_bytes = 0
        self._rows: torch.Tensor | None = None
        super().__init__()

    @property
    def keys(self) -> torch.Tensor | None:
        """All keys, `(batch, heads, tokens, size)`, in memory of their own; None before any."""
        return self._whole()[0] if self._shapes else None

    @keys.setter
    def keys(self, value: None) -> None:
        pass  # transformers clears it when the layer is made

    @property
    def values(self) -> torch.Tensor | None:
        """All values, as `keys`."""
        return self._whole()[1] if self._shapes else None

    @values.setter
    def values(self, value: None) -> None:
        pass

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Take over shapes and type from the first states."""
        if key_states.dtype != value_states.dtype:
            raise ConfigError(
                f"keys and values must have one dtype to be kept outside, got {key_states.dtype} "
                f"and {value_states.dtype}: load the model with kv='device'"
            )
        self.dtype, self.device = key_states.dtype, key_states.device
        self._shapes = (_of_token(key_states), _of_token(value_states))
        self._key_bytes = torch.Size(self._shapes[0]).numel() * key_states.element_size()
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add states of new tokens, `(batch, heads, tokens, size)`, and return those of all.

        Raises:
            ConfigError: They need a gradient, which does not pass through a file.
            ShapeError: Their shape is not that of the tokens before.
            ReadError, BackendError: Those before could not be read back, or saved.
        """
        if torch.is_grad_enabled() and (key_states.requires_grad or value_states.requires_grad):
            raise ConfigError(
                "keys and values outside the model take no part in gradients: run it under "
                "torch.no_grad(), or load it with kv='device'"
            )
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        found = (_of_token(key_states), _of_token(value_states))
        if found != self._shapes or key_states.dtype != self.dtype:
            raise ShapeError(
                f"keys and values of layer {self._index} must have the (batch, heads, size) "
                f"{self._shapes} in {self.dtype} as before, got {found} in {key_states.dtype}: "
                "reset the cache first"
            )
        old, new = self.get_seq_length(), key_states.shape[2]
        keys = key_states.new_empty((*key_states.shape[:2], old + new, key_states.shape[3]))
        values = value_states.new_empty((*value_states.shape[:2], old + new, value_states.shape[3]))
        self._gather(keys, values)
        keys[:, :, old:] = key_states
        values[:, :, old:] = value_states
        if new:
            self._store.append(self._index, _records(key_states, value_states))
        if self._rows is not None:
            fresh = torch.arange(len(key_states), device=self._rows.device).expand(new, -1)
            self._rows = torch.cat([self._rows, fresh])
        for ahead in range(1, AHEAD + 1):
            self._store.prefetch((self._index + ahead) % len(self._store))
        return keys, values

    def get_seq_length(self) -> int:
        """Return the number of tokens."""
        return self._store.tokens(self._index)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return (keys that the next query sees, the first of them)."""
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        """Return -1: there is no limit."""
        return -1

    get_max_cache_shape = get_max_length
    """The name before transformers 5.24."""

    def reset(self) -> None:
        """Forget everything."""
        self._store.clear(self._index)
        self._shapes = self._rows = None
        self.is_initialized = False

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens; the number is negative or 0, as in transformers.

        Raises:
            ConfigError: The number is positive.
        """
        if tokens_to_remove > 0:
            raise ConfigError(
                f"crop takes minus the number of tokens to remove, got {tokens_to_remove}"
            )
        left = max(0, self.get_seq_length() + tokens_to_remove)
        self._store.crop(self._index, left)
        if self._rows is not None:
            self._rows = self._rows[:left]

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Put the sequences in another order; nothing is moved."""
        if not self._shapes or not self.get_seq_length():
            return
        batch = self._shapes[0][0]
        if len(beam_idx) != batch:
            self.batch_select_indices(beam_idx)
            return
        if self._rows is None:
            rows = torch.arange(batch, device=self.device)
            self._rows = rows.expand(self.get_seq_length(), -1)
        self._rows = self._rows[:, beam_idx.to(self.device)]

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each sequence; the layer is written again."""
        if self.get_seq_length():
            keys, values = self._whole()
            self._replace(
                keys.repeat_interleave(repeats, dim=0), values.repeat_interleave(repeats, dim=0)
            )

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep only these sequences; the layer is written again."""
        if self.get_seq_length():
            keys, values = self._whole()
            self._replace(keys[indices.to(keys.device)], values[indices.to(keys.device)])

    def plain(self) -> DynamicLayer:
        """Return transformers' own layer with the same content."""
        layer = DynamicLayer()
        if self._shapes:
            layer.update(*self._whole())
        return layer

    def _replace(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        self.reset()
        self.lazy_initialization(keys, values)
        self._store.append(self._index, _records(keys, values))

    def _whole(self) -> tuple[torch.Tensor, torch.Tensor]:
        assert self._shapes is not None
        tokens = self.get_seq_length()
        keys, values = (
            torch.empty((batch, heads, tokens, size), dtype=self.dtype, device=self.device)
            for batch, heads, size in self._shapes
        )
        self._gather(keys, values)
        return keys, values

    def _gather(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Write the saved tokens to the beginning of keys and values."""
        assert self._shapes is not None
        at = 0
        try:
            for piece in self._store.take(self._index):
                stop = at + len(piece)
                for out, part, shape in (
                    (keys, piece[:, : self._key_bytes], self._shapes[0]),
                    (values, piece[:, self._key_bytes :], self._shapes[1]),
                ):
                    states = part.view(self.dtype).reshape(-1, *shape)
                    if self._rows is not None:
                        rows = self._rows[at:stop]
                        token = torch.arange(stop - at, device=rows.device)[:, None]
                        states = states[token, rows]
                    out[:, :, at:stop].copy_(states.permute(1, 2, 0, 3))
                at = stop
        finally:
            self._store.release(self._index)


def _of_token(states: torch.Tensor) -> tuple[int, ...]:
    """Return (batch, heads, size)."""
    return (states.shape[0], states.shape[1], states.shape[3])


def _records(keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Return `(tokens, bytes)`, u8, new: the keys and values of the batch, token by token."""
    parts = [
        states.permute(2, 0, 1, 3).reshape(states.shape[2], -1).contiguous().view(torch.uint8)
        for states in (keys, values)
    ]
    return torch.cat(parts, dim=1)
