"""The parameter that stands for a layer's matrix: it collects shares, then holds packed bytes."""

from collections.abc import Callable
from typing import Any

import torch
from vllm.model_executor.parameter import BasevLLMParameter

from endor.codecs import Encoded
from endor.errors import CheckpointError, ConfigError, ShapeError
from endor_vllm.placement import join_dense
from endor_vllm.shares import take


class PackedParameter(BasevLLMParameter):  # type: ignore[misc]
    """u8, empty until the layer's shares are all there.

    vLLM's layers hand a parameter a stored tensor and say which share of it is this rank's: the
    methods of `versions.LOADS` are theirs, and slice as those of `ModelWeightParameter` do.

    Args:
        name: The layer, for messages.
        shape: `(rows, cols)` of the dense matrix on this rank.
        weight_loader: The layer's.
    """

    output_dim = 0
    input_dim = 1

    def __new__(cls, name: str, shape: tuple[int, int], weight_loader: Callable[..., Any]) -> Any:
        return super().__new__(cls, data=torch.empty(0, dtype=torch.uint8))

    def __init__(
        self, name: str, shape: tuple[int, int], weight_loader: Callable[..., Any]
    ) -> None:
        super().__init__(data=self.data, weight_loader=weight_loader)
        self.layer_name = name
        self.dense_shape = shape
        self._parts: list[tuple[int, Encoded]] | None = []

    def load_column_parallel_weight(self, loaded_weight: torch.Tensor) -> None:
        rows = self.dense_shape[0]
        self._take(self._slice(loaded_weight, 0, self.tp_rank, rows), 0, rows)

    def load_row_parallel_weight(self, loaded_weight: torch.Tensor) -> None:
        rows, cols = self.dense_shape
        self._take(self._slice(loaded_weight, 1, self.tp_rank, cols), 0, rows)

    def load_merged_column_weight(self, loaded_weight: torch.Tensor, **kwargs: Any) -> None:
        at, rows = kwargs["shard_offset"], kwargs["shard_size"]
        self._take(self._slice(loaded_weight, 0, self.tp_rank, rows), at, rows)

    def load_qkv_weight(self, loaded_weight: torch.Tensor, **kwargs: Any) -> None:
        at, rows = kwargs["shard_offset"], kwargs["shard_size"]
        # As many ranks as `num_heads` says share the same heads of keys and values.
        rank = self.tp_rank if kwargs["shard_id"] == "q" else self.tp_rank // kwargs["num_heads"]
        self._take(self._slice(loaded_weight, 0, rank, rows), at, rows)

    def load_whole(self, _: Any, loaded_weight: torch.Tensor) -> None:
        """Take a matrix that every rank has: the loader of replicated layers."""
        self._take(loaded_weight, 0, self.dense_shape[0])

    def collected(self) -> list[tuple[int, Encoded]]:
        """Return all shares by row, and forget them.

        Raises:
            CheckpointError: Rows are missing, or were given twice.
            ConfigError: They were collected before.
        """
        given = self._loading()
        parts, self._parts = join_dense(given), None
        given.clear()  # vLLM keeps a copy of a parameter's attributes, and with it this list
        row = 0
        for at, encoded in parts:
            if at != row:
                break
            row += encoded.spec.shape[0]
        if row != self.dense_shape[0] or not parts:
            found = ", ".join(f"{at}..{at + encoded.spec.shape[0]}" for at, encoded in parts)
            raise CheckpointError(
                f"{self.layer_name}: the checkpoint must have each of its {self.dense_shape[0]} "
                f"rows once, got {found or 'none'}; `endor verify` the checkpoint, and compare its "
                "config.json with its tensors (endor inspect)"
            )
        return parts

    def _slice(self, loaded: torch.Tensor, axis: int, rank: int, size: int) -> torch.Tensor:
        if loaded.ndim != 2 or loaded.shape[axis] < (rank + 1) * size:
            raise self._misfit(loaded)
        return loaded.narrow(axis, rank * size, size)

    def _take(self, share: torch.Tensor, row: int, rows: int) -> None:
        if tuple(share.shape) != (rows, self.dense_shape[1]):
            raise self._misfit(share)
        self._loading().append((row, take(share)[1]))

    def _loading(self) -> list[tuple[int, Encoded]]:
        if self._parts is None:
            raise ConfigError(
                f"{self.layer_name}: packed weights are loaded once; start vLLM anew instead of "
                "loading weights again"
            )
        return self._parts

    def _misfit(self, found: torch.Tensor) -> ShapeError:
        return ShapeError(
            f"{self.layer_name}: takes {list(self.dense_shape)} of a matrix, got "
            f"{list(found.shape)}: config.json and the tensors are of different models"
        )
