"""Tiny models as Hugging Face directories, and packed."""

from pathlib import Path
from typing import Any

import torch

SIZES: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 320,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}

FAMILIES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "phi3": "Phi3ForCausalLM",
    "mixtral": "MixtralForCausalLM",
}
"""Plain; biases and a tied head; matrices that are fused in the checkpoint; experts."""


def make_model(family: str, folder: Path) -> Path:
    """Write a random model in bfloat16 and return its directory."""
    import transformers

    architecture = getattr(transformers, FAMILIES[family])
    more: dict[str, Any] = {"tie_word_embeddings": family == "qwen2"}
    if family == "mixtral":
        more |= {"num_local_experts": 4, "num_experts_per_tok": 2}
    if family == "phi3":
        more |= {"original_max_position_embeddings": 256}
    torch.manual_seed(0)
    model = architecture(architecture.config_class(**SIZES, **more))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.5)
    path = folder / family
    model.to(torch.bfloat16).save_pretrained(path)
    return path
