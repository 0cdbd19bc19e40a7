"""Linear layers of vLLM, fused ones too, whose matrix stays packed."""

from typing import Any

import torch
from vllm.model_executor.layers.linear import (
    LinearMethodBase,
    ReplicatedLinear,
    register_weight_loader_v2_supported_method,
)
from vllm.model_executor.utils import set_weight_attrs

from endor.codecs import Encoded
from endor.errors import ConfigError
from endor_vllm import op
from endor_vllm.matrix import Matrix, reserve
from endor_vllm.parameter import PackedParameter
from endor_vllm.placement import Placement


@register_weight_loader_v2_supported_method
class EndorLinearMethod(LinearMethodBase):  # type: ignore[misc]
    """What one layer does with its packed matrix.

    Attributes:
        nbytes: Bytes of the layer's parameter; the loader makes it one size for each role where
            they are streamed.
        exact: See `Matrix`; the loader sets it.
        threads: See `Matrix`; the loader sets it.
    """

    def __init__(self) -> None:
        self._parts: list[tuple[int, Encoded]] = []
        self._placement: Placement | None = None
        self.nbytes = 0
        self.exact = True
        self.threads: int | None = None

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        name = getattr(layer, "prefix", "") or type(layer).__name__
        loader = extra_weight_attrs.pop("weight_loader")
        shape = (sum(output_partition_sizes), input_size_per_partition)
        weight = PackedParameter(name, shape, loader)
        function = getattr(loader, "__func__", None)
        if function is ReplicatedLinear.weight_loader:
            weight.weight_loader = weight.load_whole
        elif getattr(function, "__name__", "") != "weight_loader_v2":
            raise ConfigError(
                f"{name}: {type(layer).__name__} loads its weight in a way that packed weights do "
                "not support: `endor unpack` the checkpoint and serve the result"
            )
        layer.register_parameter("weight", weight)
        set_weight_attrs(weight, extra_weight_attrs)
        self._dtype = params_dtype

    def settle(self, layer: Any) -> None:
        """Note what the layer was given; sets `nbytes`.

        Raises:
            CheckpointError: Something is missing.
        """
        self._parts = layer.weight.collected()
        self._placement = Placement.of(self._parts)
        self.nbytes = self._placement.nbytes

    def process_weights_after_loading(self, layer: Any) -> None:
        weight = layer.weight
        assert self._placement is not None, "the loader settles every layer"
        data = torch.empty(self.nbytes, dtype=torch.uint8, device="cpu")
        self._placement.fill(self._parts, data.numpy())
        self._parts = []
        weight.data = data.to(weight.device)
        matrix = Matrix(
            weight.layer_name,
            weight.dense_shape,
            self._dtype,
            self._placement,
            exact=self.exact,
            threads=self.threads,
        )
        reserve(weight.device, matrix.dense_nbytes)
        layer.endor = matrix
        layer.register_buffer("endor_handle", op.handle_of(matrix), persistent=False)

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        rows: int = layer.endor.shape[0]
        out: torch.Tensor = op.linear(x, layer.weight, bias, layer.endor_handle, rows)
        return out
