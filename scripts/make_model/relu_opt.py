"""Write an OPT-shaped checkpoint of random bf16 weights, most of whose neurons are zero.

Weights are normal with standard deviation 0.02. What a feed-forward block gets comes from a layer
norm, so that its inputs have variance 1 and what its neurons sum up has that of the weights times
their number: a bias of so many deviations below 0 leaves the wanted share of them at exactly 0
behind ReLU. Biases are drawn around it, so that some neurons are active more often than others.
No predictor can foresee such neurons; with --directions they mix a few directions of their inputs,
with a little of their own, as neurons of trained models do more or less.

With `--busy` the share of tokens in which a neuron is active falls with its rank by a power law,
the ranks in random order, such that so many neurons make 80 % of the activations: 26 % in OPT-30B
by PowerInfer (arXiv 2312.12456). A law that was put in, that is, not one that was found. Embeddings
are so large then that what layers add changes little of the direction: or the same vector, the mean
output of the blocks, would fill deeper layers, and the same neurons be active in all tokens.
"""

import argparse
import json
import math
from pathlib import Path
from statistics import NormalDist

import torch
from random_llama import INDEX, STD, write_tokenizer
from safetensors.torch import save_file

OWN = 0.2
"""What a neuron sums up of its own, where there are directions, in deviations of all of it."""

SPREAD = 0.5
"""Deviation of biases, in deviations of what neurons sum up."""

LARGE = 100.0
"""Times that embeddings are larger where neurons are busy by a law."""

MOST = 0.98
"""Share of tokens in which the busiest neurons are active."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add this kind's options."""
    parser.add_argument("out", type=Path)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--intermediate", type=int, default=16384)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--vocab", type=int, default=1024)
    parser.add_argument("--zeros", type=float, default=0.93, help="share of neurons at 0")
    parser.add_argument("--directions", type=int, default=0, help="that neurons look at; 0: all")
    parser.add_argument("--busy", type=float, help="share of neurons that make 80 %% of the rest")


def run(args: argparse.Namespace) -> None:
    """Write the checkpoint."""
    args.out.mkdir(parents=True)
    (args.out / "config.json").write_text(json.dumps(config(args), indent=2))
    generator = torch.Generator().manual_seed(0)
    deviation = STD * math.sqrt(args.hidden)
    middle = -NormalDist(0, math.sqrt(1 + SPREAD**2)).inv_cdf(args.zeros) * deviation

    def normal(*shape: int) -> torch.Tensor:
        return (torch.randn(shape, generator=generator) * STD).bfloat16()

    def norm(name: str) -> dict[str, torch.Tensor]:
        one = torch.ones(args.hidden, dtype=torch.bfloat16)
        return {f"{name}.weight": one, f"{name}.bias": torch.zeros_like(one)}

    large = LARGE if args.busy else 1.0
    hidden, wide, prefix = args.hidden, args.intermediate, "model.decoder"
    names = {
        f"{prefix}.embed_tokens.weight": normal(args.vocab, hidden) * large,
        f"{prefix}.embed_positions.weight": normal(2050, hidden) * large,
        **norm(f"{prefix}.final_layer_norm"),
    }
    weight_map: dict[str, str] = {}
    for number in range(args.layers + 1):
        if number:
            layer = f"{prefix}.layers.{number - 1}"
            names = norm(f"{layer}.self_attn_layer_norm") | norm(f"{layer}.final_layer_norm")
            for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
                names[f"{layer}.self_attn.{part}.weight"] = normal(hidden, hidden)
                names[f"{layer}.self_attn.{part}.bias"] = normal(hidden)
            names[f"{layer}.fc1.weight"] = normal(wide, hidden)
            if args.directions:
                few = torch.randn(wide, args.directions, generator=generator)
                mixed = few @ normal(args.directions, hidden).float() / args.directions**0.5
                own = math.sqrt(1 - OWN**2), OWN
                mixed = own[0] * mixed + own[1] * names[f"{layer}.fc1.weight"].float()
                names[f"{layer}.fc1.weight"] = mixed.bfloat16()
            if args.busy:
                order = torch.randperm(wide, generator=generator)
                bias = skewed_bias(wide, 1 - args.zeros, args.busy)[order] * deviation
            else:
                bias = middle + torch.randn(wide, generator=generator) * SPREAD * deviation
            names[f"{layer}.fc1.bias"] = bias.bfloat16()
            names[f"{layer}.fc2.weight"] = normal(hidden, wide)
            names[f"{layer}.fc2.bias"] = normal(hidden)
        file = f"model-{number + 1:05d}-of-{args.layers + 1:05d}.safetensors"
        save_file(names, args.out / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (args.out / INDEX).write_text(json.dumps(index))
    write_tokenizer(args.out, args.vocab)


def skewed_bias(neurons: int, active: float, busy: float) -> torch.Tensor:
    """Return biases, in deviations of what neurons sum up, of neurons by their rank.

    Args:
        neurons: How many.
        active: Share of them that is not zero in a token.
        busy: Share of them that make 80 % of what is not zero.
    """
    low, high = 0.0, 3.0
    for _ in range(30):  # the exponent: the higher, the fewer make most
        middle = (low + high) / 2
        shares = skewed_shares(neurons, active, middle)
        few = shares[: round(busy * neurons)].sum() / shares.sum()
        low, high = (middle, high) if few < 0.8 else (low, middle)
    shifts: torch.Tensor = torch.special.ndtri(skewed_shares(neurons, active, high)).float()
    return shifts


def skewed_shares(neurons: int, active: float, exponent: float) -> torch.Tensor:
    """Return in what share of tokens neurons are active, by their rank, on average `active`."""
    shares = torch.arange(1, neurons + 1, dtype=torch.float64) ** -exponent
    for _ in range(30):  # none is active in more than nearly all tokens
        shares = (shares * (active / shares.mean())).clamp(max=MOST)
    return shares


def config(args: argparse.Namespace) -> dict[str, object]:
    """Return the checkpoint's config.json."""
    return {
        "architectures": ["OPTForCausalLM"],
        "model_type": "opt",
        "hidden_size": args.hidden,
        "word_embed_proj_dim": args.hidden,
        "ffn_dim": args.intermediate,
        "num_hidden_layers": args.layers,
        "num_attention_heads": args.heads,
        "vocab_size": args.vocab,
        "max_position_embeddings": 2048,
        "activation_function": "relu",
        "do_layer_norm_before": True,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "dtype": "bfloat16",
    }
