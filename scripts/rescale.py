"""Take a Llama-like model off whatever grid its weights lie on, without changing what it computes.

    python scripts/rescale.py MODEL OUT [--amplitude 0.3] [--seed 0]

Weights that come from a quantised file (SmolLM2's from 4 bits) lie on a grid, and a quantiser that
meets the same grid again looks better than it is. Here each input of a matrix is multiplied by a
random factor, and what feeds it is divided by the same: norms before q, k, v and before gate, up;
v before o (one factor for a key-value head's channel); up before down. Outputs stay equal up to
rounding to the checkpoint's type.
"""

import argparse
from pathlib import Path
from typing import Any

import torch


def rescale(model: Any, amplitude: float, seed: int) -> None:
    """Multiply columns of every decoder matrix by random factors, and undo it before them."""
    generator = torch.Generator().manual_seed(seed)

    def factors(count: int) -> torch.Tensor:
        return torch.exp((torch.rand(count, generator=generator) * 2 - 1) * amplitude)

    config = model.config
    heads = config.num_attention_heads // config.num_key_value_heads
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        groups = (
            (layer.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj)),
            (layer.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj)),
        )
        for norm, matrices in groups:
            by = factors(config.hidden_size)
            norm.weight.data /= by
            for matrix in matrices:
                matrix.weight.data *= by
        by = factors(attention.v_proj.out_features)
        attention.v_proj.weight.data *= by[:, None]
        each = by.view(config.num_key_value_heads, 1, -1).expand(-1, heads, -1).reshape(-1)
        attention.o_proj.weight.data /= each
        by = factors(config.intermediate_size)
        mlp.up_proj.weight.data *= by[:, None]
        mlp.down_proj.weight.data /= by


def main() -> None:
    """Write the rescaled checkpoint."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--amplitude", type=float, default=0.3)
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(chosen.model, dtype=torch.float32)
    dtype = model.config.dtype or torch.bfloat16
    rescale(model, chosen.amplitude, chosen.seed)
    model.to(torch.bfloat16 if dtype == torch.float32 else dtype).save_pretrained(chosen.out)
    AutoTokenizer.from_pretrained(chosen.model).save_pretrained(chosen.out)


if __name__ == "__main__":
    main()
