"""Prune and pack a synthetic checkpoint several times larger than the memory it may use.

    python scripts/prune_memory.py FOLDER [--gigabytes 2] [--limit 1.5] [--method admm]

Writes a random Llama in bf16, one decoder layer a shard, without ever holding the model; runs
`endor pack --prune METHOD` in a child process, and prints the child's peak resident memory (VmHWM).
Exits with 1 when the peak exceeds the limit.
"""

import argparse
import json
import os
import sys
from pathlib import Path

import torch
from endor_child import run_endor
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, PreTrainedTokenizerFast

HIDDEN, INNER, VOCAB = 1536, 4096, 8192


def layer_tensors(layer: int) -> dict[str, torch.Tensor]:
    """Return one random decoder layer."""
    torch.manual_seed(layer + 1)
    prefix = f"model.layers.{layer}"
    shapes = {f"self_attn.{name}_proj": (HIDDEN, HIDDEN) for name in "qkvo"}
    shapes |= {"mlp.gate_proj": (INNER, HIDDEN), "mlp.up_proj": (INNER, HIDDEN)}
    shapes |= {"mlp.down_proj": (HIDDEN, INNER)}
    tensors = {
        f"{prefix}.{name}.weight": (torch.randn(shape) * 0.02).bfloat16()
        for name, shape in shapes.items()
    }
    for name in ("input_layernorm", "post_attention_layernorm"):
        tensors[f"{prefix}.{name}.weight"] = torch.ones(HIDDEN, dtype=torch.bfloat16)
    return tensors


def make(folder: Path, nbytes: int) -> int:
    """Write the checkpoint and return its size in bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    ends = {
        "model.embed_tokens.weight": (torch.randn(VOCAB, HIDDEN) * 0.02).bfloat16(),
        "model.norm.weight": torch.ones(HIDDEN, dtype=torch.bfloat16),
        "lm_head.weight": (torch.randn(VOCAB, HIDDEN) * 0.02).bfloat16(),
    }
    weight_map: dict[str, str] = {}
    total = layer = 0
    tensors = ends
    while True:
        file = f"model-{layer:05d}.safetensors"
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
        total += sum(tensor.nbytes for tensor in tensors.values())
        if total >= nbytes:
            break
        tensors = layer_tensors(layer)
        layer += 1
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_hidden_layers=layer,
        num_attention_heads=12,
        vocab_size=VOCAB,
        dtype="bfloat16",
        tie_word_embeddings=False,
    ).save_pretrained(folder)
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={s: i for i, s in enumerate(symbols)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    return total


def main() -> int:
    """Make, prune, pack, measure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--limit", type=float, default=1.5, help="GB of resident memory")
    parser.add_argument("--method", default="admm")
    parser.add_argument("--samples", default="32")
    parser.add_argument("--seq-len", default="512")
    parser.add_argument("--memory", default="64MB", help="of that, for activations")
    chosen = parser.parse_args()
    model = chosen.folder / "model"
    size = make(model, int(chosen.gigabytes * 1e9))
    words = ["pack", model, chosen.folder / "packed", "--prune", chosen.method, "--overwrite"]
    words += ["--samples", chosen.samples, "--seq-len", chosen.seq_len]
    words += ["--memory", chosen.memory, "--scratch", chosen.folder / "scratch"]
    report, seconds, peak = run_endor(words)
    record = {
        "method": chosen.method,
        "checkpoint_bytes": size,
        "peak_bytes": peak,
        "limit_bytes": int(chosen.limit * 1e9),
        "seconds": round(seconds, 1),
        "cpus": os.cpu_count(),
        "report": report,
    }
    print(json.dumps(record))
    return int(peak > chosen.limit * 1e9)


if __name__ == "__main__":
    sys.exit(main())
