"""Tiny random models of many architectures, saved as checkpoints with a tokenizer."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

COMMON: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 259,
    "max_position_embeddings": 128,
}
HEAD = {"head_dim": 16}
OLD = {key: COMMON[key] for key in COMMON if key != "num_key_value_heads"}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}

ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", COMMON),
    "mistral": ("MistralConfig", COMMON | HEAD | {"sliding_window": 8}),
    "qwen2": (
        "Qwen2Config",
        COMMON | {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3Config", COMMON | HEAD),
    "gemma2": ("Gemma2Config", COMMON | HEAD | {"sliding_window": 8}),
    "gemma3": ("Gemma3TextConfig", COMMON | HEAD | {"sliding_window": 8}),
    "opt": (
        "OPTConfig",
        {key: OLD[key] for key in OLD if key != "intermediate_size"}
        | {"ffn_dim": 96, "word_embed_proj_dim": 64},
    ),
    "phi3": ("Phi3Config", COMMON | {"pad_token_id": 0}),
    "gpt_neox": ("GPTNeoXConfig", OLD),
    "gpt2": (
        "GPT2Config",
        {"n_embd": 64, "n_layer": 3, "n_head": 4, "vocab_size": 259, "n_positions": 128},
    ),
    "mixtral": ("MixtralConfig", COMMON | HEAD | {"num_local_experts": 4}),
    "qwen3_moe": ("Qwen3MoeConfig", COMMON | HEAD | EXPERTS),
    # Experts of other forms.
    "gpt_oss": (
        "GptOssConfig",
        COMMON | HEAD | {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8},
    ),
    "llama4": (
        "Llama4TextConfig",
        COMMON
        | HEAD
        | {"num_local_experts": 4, "num_experts_per_tok": 1, "intermediate_size_mlp": 96},
    ),
    "jetmoe": (
        "JetMoeConfig",
        OLD | {"num_key_value_heads": 2, "kv_channels": 32, "num_local_experts": 4},
    ),
}


def save_tokenizer(directory: Path) -> None:
    """Write a tokenizer of single bytes that adds nothing by itself."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {symbol: index for index, symbol in enumerate(["<s>", "</s>", "<u>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<u>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<u>"
    ).save_pretrained(directory)


def save_model(directory: Path, architecture: str, dtype: torch.dtype = torch.float32) -> Any:
    """Write a random model and return it."""
    import transformers

    torch.manual_seed(0)
    name, fields = ARCHITECTURES[architecture]
    config = getattr(transformers, name)(**fields)
    model = transformers.AutoModelForCausalLM.from_config(config).eval().to(dtype)
    for parameter in model.parameters():
        if parameter.dim() > 1:  # larger than the usual 0.02: attention and routing matter
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(directory)
    save_tokenizer(directory)
    return model


@pytest.fixture(scope="session")
def save() -> Any:
    """Return `save_model`, quiet."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return save_model


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """A calibration text of some 6000 bytes."""
    path = tmp_path / "text.txt"
    generator = torch.Generator().manual_seed(1)
    letters = "abcdefghijklmnopqrstuvwxyz     ,."
    picks = torch.randint(0, len(letters), (6000,), generator=generator)
    path.write_text("".join(letters[int(pick)] for pick in picks))
    return path


@pytest.fixture
def chats(tmp_path: Path) -> Path:
    """A JSONL file with one row of each kind that is read."""
    path = tmp_path / "rows.jsonl"
    rows = [
        "a plain string",
        {"text": "a text field"},
        {"content": "a content field"},
        {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]},
    ]
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    return path
