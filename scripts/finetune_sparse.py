"""Train the survivors of a pruned model for a while, zeros held: the recipe of docs/pruning.md.

    python scripts/finetune_sparse.py PRUNED OUT [--teacher DENSE] [--masks FILE] [--steps 100]

PRUNED is a dense checkpoint with zeros in it (`endor prune`), or the original one beside --masks
(`endor prune --mask-only`). With --teacher the loss is the divergence from what the dense model
predicts, else that of the next token. OUT is an ordinary checkpoint with the same zeros, for
`endor pack`. The text is --calibration FILE (may be repeated), or the mix that Endor ships.
"""

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer

from endor.pruning import PruneOptions, hold_masks, load_masks
from endor.pruning.calibration import calibration_windows, shipped_texts

WARMUP = 0.1
"""Share of the steps over which the rate rises; then it falls as a cosine."""


def loss_of(model: Any, teacher: Any, ids: torch.Tensor) -> torch.Tensor:
    """Return nats a token: divergence from the teacher, or cross-entropy of the text."""
    logits = model(input_ids=ids).logits[:, :-1].flatten(0, 1).float()
    if teacher is None:
        return functional.cross_entropy(logits, ids[:, 1:].flatten())
    with torch.no_grad():
        wanted = teacher(input_ids=ids).logits[:, :-1].flatten(0, 1).float()
    return functional.kl_div(
        logits.log_softmax(-1), wanted.log_softmax(-1), log_target=True, reduction="batchmean"
    )


def train(model: Any, teacher: Any, windows: torch.Tensor, chosen: argparse.Namespace) -> None:
    """Take `chosen.steps` steps of AdamW; prints the mean loss of every tenth of them."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=chosen.rate, weight_decay=0.0, fused=True)
    generator = torch.Generator().manual_seed(chosen.seed)
    order = torch.randperm(len(windows), generator=generator)
    recent: list[float] = []
    for step in range(chosen.steps):
        at = torch.arange(step * chosen.batch, (step + 1) * chosen.batch) % len(windows)
        warm = min(1.0, (step + 1) / (WARMUP * chosen.steps))
        for group in optimizer.param_groups:
            group["lr"] = chosen.rate * warm * (1 + math.cos(math.pi * step / chosen.steps)) / 2
        with torch.autocast(chosen.device, torch.bfloat16):
            loss = loss_of(model, teacher, windows[order[at]].to(chosen.device))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        recent.append(loss.item())
        if (step + 1) % max(1, chosen.steps // 10) == 0:
            print(f"step {step + 1}: loss {sum(recent) / len(recent):.4f}", flush=True)
            recent.clear()


def main() -> None:
    """Load, hold, train, save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pruned", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--masks", type=Path, help="the zeros of PRUNED when omitted")
    parser.add_argument("--teacher", type=Path)
    parser.add_argument("--calibration", type=Path, action="append", default=[])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=4, help="windows of a step")
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--rate", type=float, default=1e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    chosen = parser.parse_args()

    began = time.perf_counter()
    torch.manual_seed(chosen.seed)
    dtype = AutoModelForCausalLM.from_pretrained(chosen.pruned, dtype="auto").dtype
    model = AutoModelForCausalLM.from_pretrained(chosen.pruned, dtype=torch.float32)
    model.to(chosen.device).train()
    teacher = None
    if chosen.teacher is not None:
        teacher = AutoModelForCausalLM.from_pretrained(chosen.teacher).to(chosen.device).eval()
    options = PruneOptions(
        calibration=tuple(chosen.calibration) or shipped_texts(),
        samples=chosen.steps * chosen.batch,
        seq_len=chosen.seq_len,
    )
    windows = calibration_windows(chosen.pruned, options)
    with hold_masks(model, load_masks(chosen.masks or chosen.pruned)) as held:
        train(model, teacher, windows, chosen)
        sparsity = held.sparsity
    model.to(dtype).save_pretrained(chosen.out)
    AutoTokenizer.from_pretrained(chosen.pruned).save_pretrained(chosen.out)
    record = {"out": str(chosen.out), "sparsity": round(sparsity, 5), "windows": len(windows)}
    print(json.dumps(record | {"seconds": round(time.perf_counter() - began, 1)}))


if __name__ == "__main__":
    main()
