"""What the plugin takes for granted in vLLM; docs/vllm.md lists it."""

from importlib.metadata import PackageNotFoundError

from endor.dependencies import internals, require
from endor.errors import DependencyError

_LAYERS = "vllm.model_executor.layers"

NAMES: dict[str, tuple[str, ...]] = {
    f"{_LAYERS}.quantization": ("register_quantization_config",),
    f"{_LAYERS}.quantization.base_config": ("QuantizationConfig",),
    f"{_LAYERS}.linear": (
        "LinearBase",
        "LinearMethodBase",
        "ReplicatedLinear",
        "register_weight_loader_v2_supported_method",
    ),
    f"{_LAYERS}.fused_moe": ("RoutedExperts",),
    "vllm.model_executor.model_loader": ("register_model_loader",),
    "vllm.model_executor.model_loader.default_loader": ("DefaultModelLoader",),
    "vllm.model_executor.offloader": (
        "NoopOffloader",
        "PrefetchOffloader",
        "get_offloader",
    ),
    "vllm.model_executor.parameter": ("BasevLLMParameter",),
}
"""Modules of vLLM and what is used of them."""

LOADS = (
    "load_column_parallel_weight",
    "load_row_parallel_weight",
    "load_merged_column_weight",
    "load_qkv_weight",
)
"""Methods by which vLLM's layers hand a parameter its share of a stored tensor."""


def check_vllm() -> None:
    """Raise `DependencyError` unless vLLM has everything that the plugin uses."""
    try:
        for module, names in NAMES.items():
            internals(module, *names)
        (parameter,) = internals("vllm.model_executor.parameter", "BasevLLMParameter")
        require("vllm", parameter, (*LOADS, "weight_loader"))
        (loader,) = internals(
            "vllm.model_executor.model_loader.default_loader", "DefaultModelLoader"
        )
        require("vllm", loader, ("get_all_weights", "load_weights", "track_weights_loading"))
    except PackageNotFoundError as error:
        raise DependencyError(f"vLLM is not installed whole: {error}") from None
