"""The small checkpoints that are tortured."""

import hashlib
import json
from pathlib import Path

import torch
from safetensors.torch import save_file

COMPANIONS = {
    "config.json": '{"model_type": "llama", "vocab_size": 100}',
    "tokenizer.json": '{"model": {}}',
    "generation_config.json": "{}",
    "LICENSE": "free",
}


def weights(layers: int, rows: int, cols: int, seed: int) -> dict[str, torch.Tensor]:
    """Return random bf16 matrices, a third of their elements zero."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for layer in range(layers):
        dense = torch.randn(rows, cols, generator=generator) * 0.05
        dense[torch.rand(rows, cols, generator=generator) < 0.3] = 0
        state[f"model.layers.{layer}.mlp.up_proj.weight"] = dense.bfloat16()
    state["model.norm.weight"] = torch.randn(cols, generator=generator)
    state["counter"] = torch.tensor(7)
    return state


def write(
    folder: Path, state: dict[str, torch.Tensor], *, shards: int = 1, kind: str = "safetensors"
) -> Path:
    """Write a Hugging Face directory."""
    folder.mkdir(parents=True)
    for name, text in COMPANIONS.items():
        (folder / name).write_text(text)
    stem, ending = ("model", ".safetensors") if kind == "safetensors" else ("pytorch_model", ".bin")
    parts: dict[str, dict[str, torch.Tensor]] = {}
    for place, (name, tensor) in enumerate(state.items()):
        number = place * shards // len(state)
        file = f"{stem}-{number + 1:05d}-of-{shards:05d}{ending}" if shards > 1 else stem + ending
        parts.setdefault(file, {})[name] = tensor
    for file, part in parts.items():
        if kind == "safetensors":
            save_file(part, folder / file, metadata={"format": "pt"})
        else:
            torch.save(part, folder / file)
    if shards > 1:
        weight_map = {name: file for file, part in parts.items() for name in part}
        index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
        (folder / f"{stem}{ending}.index.json").write_text(json.dumps(index))
    return folder


def write_language_model(folder: Path) -> Path:
    """Write a tiny llama with a tokenizer of bytes, for calibrated pruning."""
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=259,
        max_position_embeddings=128,
    )
    transformers.LlamaForCausalLM(config).bfloat16().save_pretrained(folder)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {symbol: index for index, symbol in enumerate(["<s>", "</s>", "<u>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<u>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<u>"
    ).save_pretrained(folder)
    return folder


def tree(folder: Path) -> dict[str, str]:
    """Return a hash of every file below `folder`."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
