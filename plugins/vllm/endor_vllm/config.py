"""The quantisation method `endor`, as vLLM finds it in the config.json of a packed checkpoint."""

from typing import Any

import torch
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.layers.quantization.base_config import (
    QuantizationConfig,
    QuantizeMethodBase,
)
from vllm.model_executor.offloader import NoopOffloader, PrefetchOffloader, get_offloader

from endor.checkpoint.loadable import refuse_quantized
from endor.errors import ConfigError, FormatError
from endor.storage.layout import VERSIONS
from endor_vllm.linear import EndorLinearMethod


class EndorVllmConfig(QuantizationConfig):  # type: ignore[misc]
    """Linear layers stay packed; embeddings and heads are dense; experts are refused."""

    def get_name(self) -> str:
        return "endor"

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return 75

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "EndorVllmConfig":
        """Return the method for a checkpoint's `quantization_config`.

        Raises:
            FormatError: It is of a version that this Endor does not know.
            ConfigError: The weights were quantised before they were packed.
        """
        version = config.get("format_version")
        if version not in VERSIONS:
            raise FormatError(
                f"quantization_config: format_version must be {VERSIONS[0]} to {VERSIONS[-1]}, "
                f"got {version!r}; a newer Endor may read this checkpoint"
            )
        refuse_quantized(config)
        return cls()

    def get_quant_method(self, layer: Any, prefix: str) -> QuantizeMethodBase | None:
        """Return how a layer keeps its weights; None for those that keep dense ones.

        Raises:
            ConfigError: The layer, or how vLLM was started, does not go with packed weights.
        """
        if isinstance(layer, RoutedExperts):
            raise ConfigError(
                f"{prefix}: experts of a mixture do not stay packed in vLLM yet: `endor unpack` "
                "the checkpoint and serve the result, or use `endor serve`"
            )
        if not isinstance(layer, LinearBase):
            return None
        check_start()
        return EndorLinearMethod()


def check_start() -> None:
    """Raise `ConfigError` when vLLM was started in a way that packed weights do not go with."""
    load_format = get_current_vllm_config().load_config.load_format
    if load_format != "endor":
        raise ConfigError(
            f"a packed checkpoint is read with --load-format endor (load_format='endor'), not "
            f"{load_format!r}"
        )
    if not isinstance(get_offloader(), NoopOffloader | PrefetchOffloader):
        raise ConfigError(
            "packed weights are offloaded by vLLM's prefetching alone: leave out --cpu-offload-gb "
            "and say --offload-group-size, --offload-num-in-group and --offload-prefetch-step"
        )
