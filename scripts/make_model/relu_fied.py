"""Write a Llama whose feed-forward blocks have ReLU in place of SiLU, a threshold below it.

    python scripts/make_model relufied DENSE START --zeros 0.8
    python scripts/finetune_sparse.py START OUT --teacher DENSE --steps 60

`silu(gate)` becomes `relu(gate - t)`, the threshold t of each block (a bias of `gate_proj`) being
what so many of its gates lie below on calibration text (Mirzadeh et al., arXiv 2310.04564). Alone
it is far from DENSE; a short distillation brings it back as far as that goes. It stands in for a
model that was trained to have zeros, where there is none.
"""

import argparse
from functools import partial
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

from endor.pruning import PruneOptions
from endor.pruning.calibration import calibration_windows

WINDOWS = 8
SAMPLE = 1 << 20
"""Gates that a quantile is taken of."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add this kind's options."""
    parser.add_argument("dense", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--zeros", type=float, default=0.8, help="share of gates below t")


def shift(gate: torch.nn.Module, _args: object, out: torch.Tensor, *, zeros: float) -> torch.Tensor:
    """Set the bias of a gate by what it gives now, and return what it gives then.

    So the blocks behind it see what it will make of the text.
    """
    sample = out.flatten()[:: max(1, out.numel() // SAMPLE)].float()
    threshold = sample.quantile(zeros)
    assert isinstance(gate.bias, torch.Tensor)
    gate.bias.fill_(-float(threshold))
    return out + gate.bias


def run(args: argparse.Namespace) -> None:
    """Write the checkpoint."""
    transformers.logging.set_verbosity_error()
    dense = AutoModelForCausalLM.from_pretrained(args.dense, dtype=torch.bfloat16).eval()
    config = transformers.AutoConfig.from_pretrained(args.dense)
    config.hidden_act, config.mlp_bias = "relu", True
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    model.load_state_dict(dense.state_dict(), strict=False)
    ids = calibration_windows(args.dense, PruneOptions(samples=WINDOWS))
    with torch.no_grad():
        for name, bias in model.named_parameters():
            if ".mlp." in name and name.endswith("bias"):
                bias.zero_()
        hooks = [
            layer.mlp.gate_proj.register_forward_hook(partial(shift, zeros=args.zeros))
            for layer in model.model.layers
        ]
        model(ids)
        for hook in hooks:
            hook.remove()
    model.save_pretrained(args.out)
    AutoTokenizer.from_pretrained(args.dense).save_pretrained(args.out)
