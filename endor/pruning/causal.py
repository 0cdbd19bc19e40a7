"""The causal language model of a checkpoint, without weights, and its decoder layers."""

from typing import Any

import torch
from torch import nn

from endor.checkpoint.sources.contract import CheckpointSource
from endor.errors import BackendError, CheckpointError, ConfigError, PruningError
from endor.models.empty import empty_model
from endor.models.layers import layer_list
from endor.trust import read_model_config


def causal_model(source: CheckpointSource, *, trust_remote_code: bool) -> Any:
    """Return the causal language model with parameters on the meta device, in eval mode."""
    try:
        import accelerate  # noqa: F401
        from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
    except ImportError as error:
        raise BackendError(
            f"calibrated pruning needs transformers and accelerate: {error}; "
            "pip install 'endor-sparse[hf]'"
        ) from None
    if source.directory is None or not (source.directory / "config.json").exists():
        raise CheckpointError(
            f"{source.path}: calibrated pruning needs config.json and a tokenizer beside the "
            "weights; give the directory, or prune with magnitude"
        )
    config = read_model_config(source.directory, trust_remote_code=trust_remote_code)
    if (source.config() or {}).get("quantization_config"):
        raise PruningError(
            f"{source.path}: config.json says that its weights are quantized, so they mean nothing "
            "without their scales; prune the checkpoint it was made from"
        )
    errors = []
    for maker in (AutoModelForCausalLM, AutoModelForImageTextToText):
        try:
            model = empty_model(
                maker,
                config,
                source.directory,
                dtype=torch.float32,
                computed_buffers=True,
                trust_remote_code=trust_remote_code,
            )
            break
        except ConfigError as error:
            if not isinstance(error.__cause__, ValueError):
                raise
            errors.append(str(error.__cause__).partition("\n")[0].partition(" Model type")[0])
    else:
        raise PruningError(
            f"{source.path}: transformers makes no causal language model of it: {errors[0]}; prune "
            "with magnitude"
        )
    if getattr(model.config, "is_encoder_decoder", False):
        raise PruningError(
            f"{source.path}: {type(model).__name__} has an encoder beside its decoder, and "
            "calibrated pruning runs language models that are a decoder alone; prune with magnitude"
        )
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")
    for module in model.modules():
        if isinstance(module, nn.Embedding):  # tables stay in their own type: they can be large
            module.register_forward_hook(lambda _module, _args, out: out.float())
    return model.eval()


def decoder_layers(model: Any) -> tuple[str, nn.ModuleList]:
    """Return the name of the list of decoder layers, and the list.

    Of several lists as long, that of the text decoder: a tower for images can have as many layers.
    """
    count = model.config.get_text_config(decoder=True).num_hidden_layers
    found = layer_list(model, count)
    if found is not None:
        return found
    raise PruningError(
        f"{type(model).__name__}: has no list of {count} decoder layers; prune with magnitude"
    )
