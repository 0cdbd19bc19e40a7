"""Quality against bits a weight, every method on the same statistics: docs/benchmarks/quality.md.

    python scripts/quality_bench.py MODEL OUT.jsonl --rows ecq:3.5 gptq:4:64 --texts FILE:WINDOWS
    python scripts/quality_table.py OUT.jsonl --plot quality.svg

Rows are `dense`, `dir:PATH:BITS` (a checkpoint made elsewhere), and those of `quality_methods.py`.
Statistics are those of the dense model on the calibration windows (kept in --statistics, made when
missing), so that rows differ in nothing but the method. The model is in memory: for small ones. A
record a row is appended to OUT.jsonl; rows that are there are skipped.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from quality_methods import quantizer_of
from torch import nn


def matrices(model: Any) -> dict[str, nn.Linear]:
    """Return the linear layers of the decoder layers by name."""
    return {
        name: module
        for name, module in model.model.layers.named_modules()
        if isinstance(module, nn.Linear)
    }


def statistics(model: Any, model_dir: Path, samples: int, path: Path) -> dict[str, torch.Tensor]:
    """Return mean x xᵀ of each matrix's inputs; q, k, v and gate, up share one."""
    if path.exists():
        return dict(torch.load(path))
    from endor.pruning import PruneOptions
    from endor.pruning.calibration import calibration_windows

    ids = calibration_windows(model_dir, PruneOptions(samples=samples))
    sums: dict[str, torch.Tensor] = {}

    def watch(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(_module: nn.Module, args: tuple[Any, ...]) -> None:
            inputs = args[0].reshape(-1, args[0].shape[-1])
            found = inputs.T @ inputs / ids.numel()
            sums[name] = sums[name] + found if name in sums else found

        return hook

    leaders = [name for name in matrices(model) if shared(name) == name]
    handles = [matrices(model)[name].register_forward_pre_hook(watch(name)) for name in leaders]
    with torch.no_grad():
        for window in torch.split(ids, 4):
            model.model(window, use_cache=False)
    for handle in handles:
        handle.remove()
    torch.save(sums, path)
    return sums


def shared(name: str) -> str:
    """Return the matrix whose inputs the matrix `name` shares."""
    for mine, theirs in (("k_proj", "q_proj"), ("v_proj", "q_proj"), ("up_proj", "gate_proj")):
        name = name.replace(mine, theirs)
    return name


def apply(model: Any, row: str, grams: dict[str, torch.Tensor]) -> dict[str, float]:
    """Quantise all matrices of `model` in place; return bits, relative error, seconds."""
    quantize = quantizer_of(row)
    began = time.perf_counter()
    bits = weights = 0.0
    logs = []
    for name, module in matrices(model).items():
        weight, gram = module.weight.data, grams[shared(name)]
        values, each = quantize(name, weight, gram)
        change = values - weight
        error = float(((change @ gram) * change).sum() / ((weight @ gram) * weight).sum())
        logs.append(torch.tensor(error).log())
        module.weight.data.copy_(values)
        bits += each * weight.numel()
        weights += weight.numel()
    return {
        "bits": bits / weights,
        "error": float(torch.stack(logs).mean().exp()),
        "seconds": round(time.perf_counter() - began, 1),
    }


class Remembered:
    """The dense model, run once for each window; its logits are kept in float16."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.device = model.device
        self._logits: dict[bytes, torch.Tensor] = {}

    def __call__(self, input_ids: torch.Tensor, *, use_cache: bool) -> Any:
        key = input_ids.numpy().tobytes()
        if key not in self._logits:
            self._logits[key] = self.model(input_ids=input_ids, use_cache=use_cache).logits.half()
        return argparse.Namespace(logits=self._logits[key].float())


def measure(
    row: str, chosen: argparse.Namespace, load: Callable[[Path], Any], dense: Remembered
) -> dict[str, Any]:
    """Return the record of one row."""
    from transformers import AutoTokenizer

    from endor.bench.quality.perplexity import agreement, tokenize

    tokenizer = AutoTokenizer.from_pretrained(chosen.model)
    if row.startswith("dir:"):
        _, path, bits = row.split(":")
        model, record = load(Path(path)), {"bits": float(bits)}
    else:
        model, record = load(chosen.model), {"bits": 16.0}
        if row != "dense":
            grams = statistics(dense.model, chosen.model, chosen.samples, chosen.statistics)
            record = apply(model, row, grams)
    out: dict[str, Any] = {"row": row, **record}
    for text in chosen.texts:
        path, _, windows = text.rpartition(":")
        tokens = tokenize(Path(path).read_text(encoding="utf-8"), tokenizer)
        found = agreement(model, dense, tokens, window=chosen.window, max_windows=int(windows))
        out[Path(path).stem] = {
            "perplexity": found.model.perplexity,
            "kl": found.kl,
            "kl_stderr": found.kl_stderr,
            "top1": found.top1,
            "nats_more": found.nll_difference,
            "nats_more_stderr": found.nll_difference_stderr,
            "windows": found.model.windows,
            "window_nll": [round(value, 5) for value in found.model.window_nll],
        }
    return out


def main() -> None:
    """Measure what OUT.jsonl does not have yet."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--rows", nargs="+", required=True)
    parser.add_argument("--texts", nargs="+", required=True, help="FILE:WINDOWS")
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--samples", type=int, default=32, help="calibration windows")
    parser.add_argument("--statistics", type=Path, default=Path("statistics.pt"))
    chosen = parser.parse_args()
    from transformers import AutoModelForCausalLM

    def load(path: Path) -> Any:
        return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()

    have = []
    if chosen.out.exists():
        have = [json.loads(line) for line in chosen.out.read_text().splitlines()]
    done = {record["row"] for record in have}
    dense = Remembered(load(chosen.model))
    for row in chosen.rows:
        if row not in done:
            with torch.no_grad():
                record = measure(row, chosen, load, dense)
            with chosen.out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
