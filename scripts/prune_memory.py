"""Prune and pack a synthetic checkpoint several times larger than the memory it may use.

    python scripts/prune_memory.py FOLDER [--gigabytes 2] [--limit 1.5] [--method admm]

Writes a random Llama in bf16, one decoder layer a shard, without ever holding the model; runs
`endor pack --prune METHOD` in a child process, and prints the child's peak resident memory (VmHWM).
Exits with 1 when the peak exceeds the limit.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

from endor_child import run_endor

HIDDEN, INNER, VOCAB = 1536, 4096, 8192


def make(model: Path, nbytes: int) -> None:
    """Write a random Llama of at least so many bytes, unless it is there."""
    if (model / "tokenizer.json").exists():
        return
    layer = 2 * (4 * HIDDEN * HIDDEN + 3 * HIDDEN * INNER + 2 * HIDDEN)
    ends = 2 * (2 * VOCAB * HIDDEN + HIDDEN)
    words: list[object] = [
        "--layers",
        -(-(nbytes - ends) // layer),
        "--hidden",
        HIDDEN,
        "--intermediate",
        INNER,
    ]
    words += ["--heads", 12, "--vocab", VOCAB]
    script = Path(__file__).with_name("make_model")
    command = [sys.executable, str(script), "random", str(model), *map(str, words)]
    subprocess.run(command, check=True, stdout=sys.stderr)


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
    model = chosen.folder / f"model-{chosen.gigabytes:g}GB"
    make(model, int(chosen.gigabytes * 1e9))
    size = sum(path.stat().st_size for path in model.glob("*.safetensors"))
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
