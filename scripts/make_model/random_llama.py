"""Write a Llama-shaped checkpoint of random bf16 weights, for benchmarks of size and speed.

Weights are normal with standard deviation 0.02, as at initialisation: what a codec or a disk sees
of them is what it sees of a trained model, their text is noise. One layer is in memory at a time.
The result is the same on every machine with the same torch.
"""

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

INDEX = "model.safetensors.index.json"
STD = 0.02


def config(args: argparse.Namespace) -> dict[str, object]:
    """Return the checkpoint's config.json."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": args.hidden,
        "intermediate_size": args.intermediate,
        "num_hidden_layers": args.layers,
        "num_attention_heads": args.heads,
        "num_key_value_heads": args.heads,
        "vocab_size": args.vocab,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "dtype": "bfloat16",
        "use_cache": True,
    }


def layer_shapes(args: argparse.Namespace) -> dict[str, tuple[int, ...]]:
    """Return the shapes of one decoder layer's tensors, in execution order."""
    hidden, wide = args.hidden, args.intermediate
    return {
        "input_layernorm.weight": (hidden,),
        "self_attn.q_proj.weight": (hidden, hidden),
        "self_attn.k_proj.weight": (hidden, hidden),
        "self_attn.v_proj.weight": (hidden, hidden),
        "self_attn.o_proj.weight": (hidden, hidden),
        "post_attention_layernorm.weight": (hidden,),
        "mlp.gate_proj.weight": (wide, hidden),
        "mlp.up_proj.weight": (wide, hidden),
        "mlp.down_proj.weight": (hidden, wide),
    }


def shards(args: argparse.Namespace) -> list[dict[str, tuple[int, ...]]]:
    """Return the tensors of each shard: the embedding, the layers, then norm and head."""
    hidden = args.hidden
    layers: list[dict[str, tuple[int, ...]]] = [
        {f"model.layers.{at}.{name}": shape for name, shape in layer_shapes(args).items()}
        for at in range(args.layers)
    ]
    first: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (args.vocab, hidden)}
    last: dict[str, tuple[int, ...]] = {
        "model.norm.weight": (hidden,),
        "lm_head.weight": (args.vocab, hidden),
    }
    return [first, *layers, last]


def write_tokenizer(out: Path, vocab: int) -> None:
    """Write a tokenizer whose tokens are bytes, for loaders that want one."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = ["<pad>", "<s>", "</s>", *alphabet, *(f"<unused{at}>" for at in range(vocab))]
    tokens = {name: at for at, name in enumerate(names[:vocab])}
    model = Tokenizer(models.BPE(vocab=tokens, merges=[]))
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=model, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(out)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add what the command line takes."""
    parser.add_argument("out", type=Path)
    parser.add_argument("--layers", type=int, default=10)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--intermediate", type=int, default=11008)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--vocab", type=int, default=4096)
    parser.add_argument("--seed", type=int, default=0)


def run(args: argparse.Namespace) -> None:
    """Write the checkpoint; the tokenizer comes last."""
    args.out.mkdir(parents=True)
    generator = torch.Generator().manual_seed(args.seed)
    weight_map: dict[str, str] = {}
    total, parts = 0, shards(args)
    for number, part in enumerate(parts, 1):
        name = f"model-{number:05}-of-{len(parts):05}.safetensors"
        tensors = {}
        for key, shape in part.items():
            if len(shape) == 1:
                tensors[key] = torch.ones(shape, dtype=torch.bfloat16)
            else:
                tensors[key] = (torch.randn(shape, generator=generator) * STD).to(torch.bfloat16)
            total += tensors[key].nbytes
            weight_map[key] = name
        save_file(tensors, args.out / name, metadata={"format": "pt"})
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (args.out / INDEX).write_text(json.dumps(index, indent=2))
    (args.out / "config.json").write_text(json.dumps(config(args), indent=2))
    write_tokenizer(args.out, args.vocab)
    print(f"{args.out}: {total / 1e9:.2f} GB in {len(parts)} shards")
