"""Write a mixture of experts whose routers follow real text, made from a small dense model.

Each feed-forward block of a Llama-shaped checkpoint is cut up (MoEfication, Zhang et al., arXiv
2110.01786). The half of the neurons that contribute most becomes the shared expert. The others are
grouped by the tokens on which they contribute, in groups of one size, and a linear router is fitted
to predict which groups contribute most to a token. The result is an ordinary Qwen2-MoE checkpoint.
With all experts chosen it computes what DENSE does; with fewer it approximates it. Nothing in it is
trained: it stands in for a trained model where there is none.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

from endor.pruning.calibration import shipped_texts

TOKENS, WINDOW = 8192, 512
ROUNDS = 12
TEMPERATURE = 0.01
"""Deviation of router logits: small, so that the chosen experts are weighted nearly alike."""


def inputs_of_blocks(model: Any, ids: torch.Tensor) -> list[torch.Tensor]:
    """Return what each feed-forward block gets, `(tokens, hidden)` in fp32."""
    found: list[list[torch.Tensor]] = [[] for _ in model.model.layers]
    hooks = [
        layer.mlp.register_forward_pre_hook(
            lambda _, args, at=at: found[at].append(args[0].flatten(0, 1).float())
        )
        for at, layer in enumerate(model.model.layers)
    ]
    with torch.no_grad():
        for window in torch.split(ids, WINDOW):
            model(window[None])
    for hook in hooks:
        hook.remove()
    return [torch.cat(parts) for parts in found]


def group_neurons(contributions: torch.Tensor, experts: int) -> torch.Tensor:
    """Return an expert per neuron, all of one size, by balanced k-means over tokens.

    Args:
        contributions: How much each neuron contributes to each token, `(tokens, neurons)`.
        experts: Number of groups.
    """
    profile = F.normalize((contributions + 1e-6).log().T - (contributions + 1e-6).log().T.mean(0))
    neurons, size = len(profile), len(profile) // experts
    centres = profile[torch.randperm(neurons)[:experts]]
    groups = torch.zeros(neurons, dtype=torch.long)
    for _ in range(ROUNDS):
        likeness = profile @ centres.T
        groups.fill_(-1)
        room = [size] * experts
        for place in likeness.flatten().argsort(descending=True).tolist():
            neuron, expert = divmod(place, experts)
            if groups[neuron] < 0 and room[expert]:
                groups[neuron] = expert
                room[expert] -= 1
        centres = torch.stack([profile[groups == expert].mean(0) for expert in range(experts)])
        centres = F.normalize(centres)
    return groups


def fit_router(inputs: torch.Tensor, norms: torch.Tensor) -> torch.Tensor:
    """Return the weight `(experts, hidden)` that predicts the size of each expert's output."""
    gram = inputs.T @ inputs
    gram.diagonal().add_(1e-2 * gram.diagonal().mean())
    weight = torch.linalg.solve(gram, inputs.T @ norms).T
    scaled: torch.Tensor = weight * (TEMPERATURE / (inputs @ weight.T).std())
    return scaled


def convert(dense: Any, ids: torch.Tensor, experts: int, top_k: int) -> Any:
    """Return the mixture made from `dense`."""
    old = dense.config
    same: tuple[str, ...] = ("vocab_size", "hidden_size", "num_hidden_layers")
    same += ("num_attention_heads",)
    same += ("num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "rope_parameters")
    same += ("bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings")
    shared = old.intermediate_size // 2
    config = transformers.Qwen2MoeConfig(
        **{name: getattr(old, name) for name in same},
        qkv_bias=False,
        moe_intermediate_size=(old.intermediate_size - shared) // experts,
        shared_expert_intermediate_size=shared,
        num_experts=experts,
        num_experts_per_tok=top_k,
        norm_topk_prob=True,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=dense.dtype)
    rest = {name: value for name, value in dense.state_dict().items() if ".mlp." not in name}
    model.load_state_dict(rest, strict=False)
    for at, x in enumerate(inputs_of_blocks(dense, ids)):
        mlp, block = dense.model.layers[at].mlp, model.model.layers[at].mlp
        gate, up, down = (
            getattr(mlp, name).weight.data.float() for name in ("gate_proj", "up_proj", "down_proj")
        )
        active = F.silu(x @ gate.T) * (x @ up.T)
        sizes = active.abs() * down.norm(dim=0)
        order = sizes.mean(0).argsort(descending=True)
        common, routed = order[:shared], order[shared:]
        groups = group_neurons(sizes[::4, routed], experts)
        members = [routed[groups == expert] for expert in range(experts)]
        norms = torch.stack([(active[:, m] @ down[:, m].T).norm(dim=1) for m in members], dim=1)
        block.gate.weight.data.copy_(fit_router(x, norms))
        for expert, own in enumerate(members):
            block.experts.gate_up_proj.data[expert] = torch.cat([gate[own], up[own]])
            # The weights of the chosen experts sum to 1, and are nearly alike.
            block.experts.down_proj.data[expert] = down[:, own] * top_k
        block.shared_expert.gate_proj.weight.data.copy_(gate[common])
        block.shared_expert.up_proj.weight.data.copy_(up[common])
        block.shared_expert.down_proj.weight.data.copy_(down[:, common] * 2)
        block.shared_expert_gate.weight.data.zero_()  # whose sigmoid is a half
    return model.eval()


def loss(model: Any, ids: torch.Tensor) -> float:
    """Return the mean negative log-likelihood of a text."""
    with torch.no_grad():
        parts = [
            model(window[None], labels=window[None]).loss for window in torch.split(ids, WINDOW)
        ]
    return float(torch.stack(parts).mean())


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add what the command line takes."""
    parser.add_argument("dense", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--top-k", type=int, default=4)


def run(options: argparse.Namespace) -> None:
    """Convert, and say how far the result is from its source."""
    torch.manual_seed(0)
    transformers.logging.set_verbosity_error()
    tokenizer = AutoTokenizer.from_pretrained(options.dense)
    dense = AutoModelForCausalLM.from_pretrained(options.dense).eval()
    text = shipped_texts("wiki")[0].read_text(encoding="utf-8")
    ids = tokenizer(text, return_tensors="pt").input_ids[0]
    model = convert(dense, ids[:TOKENS], options.experts, options.top_k)
    model.save_pretrained(options.out)
    tokenizer.save_pretrained(options.out)
    held_out = ids[TOKENS : TOKENS + 4 * WINDOW]
    print(f"loss on text that was not fitted: dense {loss(dense, held_out):.3f}, ", end="")
    print(f"mixture {loss(model, held_out):.3f}")
