"""The load format `endor`: a packed checkpoint into the layers of a vLLM model."""

import copy
from collections.abc import Generator
from pathlib import Path
from typing import Any

import torch
from vllm.config import ModelConfig
from vllm.config.load import LoadConfig
from vllm.logger import init_logger
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.model_executor.offloader import NoopOffloader, get_offloader
from vllm.platforms import current_platform

from endor.checkpoint.directory import PACKED_INDEX_NAME
from endor.errors import CheckpointError, ConfigError
from endor_vllm.checkpoint import tensors
from endor_vllm.linear import EndorLinearMethod
from endor_vllm.processors import start_helpers
from endor_vllm.shares import Stored

logger = init_logger("vllm.endor")


class EndorLoader(DefaultModelLoader):  # type: ignore[misc]
    """Reads packed tensors, lets the model's own code distribute them, and lays each layer out.

    `model_loader_extra_config` takes `exact` (true) besides vLLM's own keys: false has few rows
    multiplied by the packed form on the CPU, with sums of another order.
    """

    def __init__(self, load_config: LoadConfig) -> None:
        given = load_config.model_loader_extra_config
        extra: dict[str, Any] = dict(given) if isinstance(given, dict) else {}
        self._exact = extra.pop("exact", True)
        if not isinstance(self._exact, bool):
            raise ConfigError(
                f"model_loader_extra_config: exact must be true or false, got {self._exact!r}"
            )
        own = copy.copy(load_config)
        own.model_loader_extra_config = extra
        super().__init__(own)
        self._stored: list[Stored] = []
        # vLLM itself leaves it to the quantised checkpoint to be whole.
        self.enable_weights_track: bool | None = extra.get("enable_weights_track", True)

    def download_model(self, model_config: ModelConfig) -> None:
        self._directory(model_config)

    def get_all_weights(
        self, model_config: ModelConfig, model: torch.nn.Module
    ) -> Generator[tuple[str, torch.Tensor], None, None]:
        if getattr(model, "secondary_weights", ()):
            raise ConfigError(
                f"{type(model).__name__} takes weights from a second checkpoint, which the load "
                "format endor does not read: `endor unpack` and serve the result"
            )
        self._stored = []
        for name, dense, stored in tensors(self._directory(model_config)):
            if stored.encoded.spec.codec != "dense":
                self._stored.append(stored)
            yield name, dense

    def load_weights(self, model: torch.nn.Module, model_config: ModelConfig) -> None:
        """Load and lay out every layer.

        Raises:
            ConfigError: The checkpoint is not a packed one.
            CheckpointError: It lacks a tensor of the model.
            FormatError: It is damaged.
        """
        if model_config.quantization != "endor":
            raise ConfigError(
                f"{model_config.model}: config.json names no packed checkpoint; leave out "
                "--load-format endor, or make one with `endor pack`"
            )
        threads = start_helpers() if current_platform.is_cpu() else None
        super().load_weights(model, model_config)
        layers: list[Any] = [
            module
            for module in model.modules()
            if isinstance(getattr(module, "quant_method", None), EndorLinearMethod)
        ]
        for layer in layers:
            layer.quant_method.exact, layer.quant_method.threads = self._exact, threads
            layer.quant_method.settle(layer)
        if not isinstance(get_offloader(), NoopOffloader):
            _one_size_per_role(layers)
        self._report(layers)

    def track_weights_loading(
        self, model: torch.nn.Module, loaded_weights: set[str] | None, quantized: bool = False
    ) -> None:
        """Raise `CheckpointError` when the checkpoint lacks a parameter of the model."""
        if loaded_weights is None:  # the model's code does not say what it loaded
            return
        try:
            super().track_weights_loading(model, loaded_weights, quantized=quantized)
        except ValueError as error:
            raise CheckpointError(
                f"the checkpoint lacks tensors of {type(model).__name__} (vLLM: {error}); compare "
                "its config.json with its tensors (endor inspect), or copy it again"
            ) from None

    def _directory(self, model_config: ModelConfig) -> Path:
        path = Path(model_config.model)
        if path.is_dir():
            return path
        from huggingface_hub import snapshot_download

        return Path(
            snapshot_download(
                model_config.model,
                revision=model_config.revision,
                cache_dir=self.load_config.download_dir,
                allow_patterns=["endor-*.safetensors", PACKED_INDEX_NAME],
            )
        )

    def _report(self, layers: list[Any]) -> None:
        kept = [stored for stored in self._stored if stored.taken]
        expanded = [stored.name for stored in self._stored if not stored.taken]
        self._stored = []
        packed = sum(layer.quant_method.nbytes for layer in layers)
        logger.info(
            "Endor: %d tensors stay packed, in %d layers of %.3f GB",
            len(kept),
            len(layers),
            packed / 1e9,
        )
        if expanded:
            logger.warning(
                "Endor: %d packed tensors are expanded in memory, for vLLM has no packed form of "
                "where they are used: %s%s",
                len(expanded),
                ", ".join(expanded[:3]),
                ", ..." if len(expanded) > 3 else "",
            )


def _one_size_per_role(layers: list[Any]) -> None:
    """Give layers of one role parameters of one size, since prefetching shares their buffers."""
    largest: dict[str, int] = {}
    for layer in layers:
        role = role_of(layer.weight.layer_name)
        largest[role] = max(largest.get(role, 0), layer.quant_method.nbytes)
    for layer in layers:
        layer.quant_method.nbytes = largest[role_of(layer.weight.layer_name)]


def role_of(name: str) -> str:
    """Return what layers of one kind have in common: the name without numbers."""
    return ".".join("*" if part.isdecimal() else part for part in name.split("."))
