"""vLLM on packed checkpoints: `vllm serve OUT --load-format endor`.

vLLM calls `register` in each of its processes. Nothing of vLLM is imported before that.
"""


def register() -> None:
    """Tell vLLM of the quantisation method and of the load format, both called `endor`.

    Raises:
        DependencyError: This vLLM has changed where the plugin reaches into it.
    """
    from endor_vllm.versions import check_vllm

    check_vllm()
    from vllm.model_executor.layers.quantization import register_quantization_config
    from vllm.model_executor.model_loader import register_model_loader

    from endor_vllm.config import EndorVllmConfig
    from endor_vllm.loader import EndorLoader

    register_quantization_config("endor")(EndorVllmConfig)
    register_model_loader("endor")(EndorLoader)
