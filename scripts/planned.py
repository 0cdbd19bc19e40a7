"""Write docs/benchmarks/planned.md: predicted speeds of large models on machines of the table.

    python scripts/planned.py [OUT.md]

Models are made on the meta device from the sizes that their publishers give; nothing is downloaded
and nothing is measured.
"""

import sys
from pathlib import Path
from typing import Any

import torch
import transformers

from endor.errors import BudgetError
from endor.hf.sketch import Sketch, plan_sketch, sketch_model
from endor.planning.catalogue import MACHINES, Described
from endor.planning.sketch import Method, method

HALF = method(sparsity=0.5)
WAYS = [method(), HALF, method(sparsity=0.7), method(bits=3.5)]

QWEN3_MOE = {
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "vocab_size": 151936,
}

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama-3-70B": (
        "Llama",
        {
            "hidden_size": 8192,
            "intermediate_size": 28672,
            "num_hidden_layers": 80,
            "num_attention_heads": 64,
            "num_key_value_heads": 8,
            "vocab_size": 128256,
        },
    ),
    "OPT-66B": (
        "OPT",
        {
            "hidden_size": 9216,
            "word_embed_proj_dim": 9216,
            "ffn_dim": 36864,
            "num_hidden_layers": 64,
            "num_attention_heads": 72,
            "vocab_size": 50272,
        },
    ),
    "Qwen3-30B-A3B": (
        "Qwen3Moe",
        {
            "hidden_size": 2048,
            "intermediate_size": 6144,
            "moe_intermediate_size": 768,
            "num_hidden_layers": 48,
            "num_attention_heads": 32,
            **QWEN3_MOE,
        },
    ),
    "Qwen3-235B-A22B": (
        "Qwen3Moe",
        {
            "hidden_size": 4096,
            "intermediate_size": 12288,
            "moe_intermediate_size": 1536,
            "num_hidden_layers": 94,
            "num_attention_heads": 64,
            **QWEN3_MOE,
        },
    ),
    "gpt-oss-120b": (
        "GptOss",
        {
            "hidden_size": 2880,
            "intermediate_size": 2880,
            "num_hidden_layers": 36,
            "num_attention_heads": 64,
            "num_key_value_heads": 8,
            "head_dim": 64,
            "num_local_experts": 128,
            "num_experts_per_tok": 4,
            "vocab_size": 201088,
        },
    ),
    "DeepSeek-V3": (
        "DeepseekV3",
        {
            "hidden_size": 7168,
            "intermediate_size": 18432,
            "moe_intermediate_size": 2048,
            "num_hidden_layers": 61,
            "num_attention_heads": 128,
            "num_key_value_heads": 128,
            "n_routed_experts": 256,
            "num_experts_per_tok": 8,
            "n_shared_experts": 1,
            "first_k_dense_replace": 3,
            "q_lora_rank": 1536,
            "kv_lora_rank": 512,
            "vocab_size": 129280,
        },
    ),
}
"""Class and published sizes of each model."""

HEAD = """# Predicted: large models on machines that are not at hand

**Nothing on this page was measured.** Tokens a second of one sequence, 1024 tokens of context, from
the cost model of `endor plan` with published constants (`endor plan --for list`; sources in
`endor/planning/catalogue.py`); weights are expanded on the device and multiplied there. Behind an
arrow: `--fast`, where that is more than a twentieth faster: products straight from packed weights
on the device (rates by the model of [gpu.md](gpu.md), `stream`), and the processor multiplying some
of what lies in RAM beside it (`host`: whole weights, `both`: rows of each, `experts`: all experts
there; [offload.md](../offload.md)). The last row of a model is of `--fast --goal throughput`:
tokens a second of all sequences, the batch behind the x, where keys and values are (the device
unless said). 50 % and 70 % are shares of zeros; what they and 3.5 bits cost in
quality is in [quality.md](quality.md). The word beside a rate is what limits the step. Sizes are of
bf16 weights: gpt-oss and DeepSeek are published in 4 and 8 bits, and packing those losslessly saves
less. Made by
`python scripts/planned.py`; for another model, machine or memory:
`endor plan DIR_OR_CONFIG.json --for rtx4090 --ram 128GiB`.
"""


def sketched(name: str) -> Sketch:
    """Return the sketch of a model of the table."""
    kind, sizes = MODELS[name]
    config = getattr(transformers, f"{kind}Config")(**sizes)
    with torch.device("meta"):
        return sketch_model(getattr(transformers, f"{kind}ForCausalLM")(config))


def cell(found: Sketch, how: Method, target: Described) -> str:
    """Return the predicted rate and its bound, and the rate with the host's help if that helps."""
    try:
        exact = plan_sketch(found, how, target=target).plan
    except BudgetError:
        return "does not run"
    text = f"{exact.decode_tokens_per_s:.3g} {exact.decode.bound}"
    fast = plan_sketch(found, how, target=target, exact=False).plan
    if fast.decode_tokens_per_s < 1.05 * exact.decode_tokens_per_s:
        return text
    return f"{text} → {fast.decode_tokens_per_s:.3g} {fast.way}"


def throughput(found: Sketch, how: Method, target: Described) -> str:
    """Return the predicted rate of as many sequences as pay, and how many these are."""
    try:
        best = plan_sketch(found, how, target=target, exact=False, goal="throughput").plan
    except BudgetError:
        return "does not run"
    batch, kv = best.workload.batch, best.workload.kv
    return f"{best.decode_tokens_per_s:.3g} x{batch}{'' if kv == 'device' else f' kv in {kv}'}"


def main() -> None:
    """Write the page."""
    out = Path(sys.argv[1] if len(sys.argv) > 1 else "docs/benchmarks/planned.md")
    lines = [HEAD]
    columns = " | ".join(MACHINES)
    for name in MODELS:
        found = sketched(name)
        lines += [
            f"## {name}: {found.parameters / 1e9:.0f} G parameters",
            f"| packed | GB | {columns} |",
            "|---|---|" + "---|" * len(MACHINES),
        ]
        for how in WAYS:
            packed = sum(matrix.numel for matrix in found.matrices) * how.bits / 8e9
            cells = " | ".join(cell(found, how, target) for target in MACHINES.values())
            lines.append(f"| {how.label}, {how.bits:.1f} bits | {packed:.0f} | {cells} |")
        packed = sum(matrix.numel for matrix in found.matrices) * HALF.bits / 8e9
        cells = " | ".join(throughput(found, HALF, target) for target in MACHINES.values())
        lines += [f"| {HALF.label}, all sequences | {packed:.0f} | {cells} |", ""]
    out.write_text("\n".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
