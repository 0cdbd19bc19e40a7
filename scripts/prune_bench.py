"""Prune a model in several ways and measure what is left of it: the table of docs/benchmarks.

    python scripts/prune_bench.py MODEL WORK OUT.jsonl --methods magnitude wanda --cells 0.5 2:4

Each cell runs `endor pack --prune` in a child process (time and peak memory are the child's), then
`endor eval` on each text, against the dense model. One JSON line a cell is appended to OUT.jsonl;
cells that are there already are skipped, so that an interrupted run goes on. --plot draws what
OUT.jsonl has with the same options: perplexity on the first text against bits per weight.
"""

import argparse
import json
import os
import shutil
from pathlib import Path
from typing import Any

from endor_child import run_endor


def measure(chosen: argparse.Namespace, method: str, cell: str) -> dict[str, Any]:
    """Return the record of one method at one sparsity or pattern."""
    packed = chosen.work / f"{method}-{cell.replace(':', 'of')}"
    shutil.rmtree(packed, ignore_errors=True)
    amount = ["--pattern", cell] if ":" in cell else ["--sparsity", cell]
    words = ["pack", chosen.model, packed, "--prune", method, "--overwrite", *amount]
    report, seconds, peak = run_endor([*words, *chosen.options])
    record = {
        "method": method,
        "cell": cell,
        "options": chosen.options,
        "seconds": round(seconds, 1),
        "peak_bytes": peak,
        "bits_per_weight": report["bits_per_weight"],
        "density": report["density"],
        "cpus": os.cpu_count(),
    }
    for text in chosen.texts:
        path, _, windows = text.rpartition(":")
        words = ["eval", packed, "--text", path, "--max-windows", windows]
        found, _, _ = run_endor([*words, "--dtype", "float32", "--against", chosen.model])
        record[Path(path).stem] = found
    shutil.rmtree(packed)
    return record


def plot(records: list[dict[str, Any]], text: str, path: Path) -> None:
    """Draw a line for each method through its sparsities, which the highest line names."""
    from endor.bench.plot import Point, quality

    records = [record for record in records if ":" not in record["cell"]]
    records.sort(key=lambda record: -record[text]["perplexity"])
    points = [
        Point(
            f"{float(record['cell']):.0%}" if record["method"] == records[0]["method"] else "",
            record["bits_per_weight"],
            record[text]["perplexity"],
            record["method"],
        )
        for record in records
    ]
    first = records[0][text]
    title = f"{text}: {first['tokens']} tokens, windows of {first['window']}"
    quality(points, path, title=title)


def main() -> None:
    """Measure what OUT.jsonl does not have yet."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--methods", nargs="+", required=True)
    parser.add_argument("--cells", nargs="+", default=["0.5", "0.6", "0.7", "2:4"])
    parser.add_argument("--texts", nargs="+", required=True, help="FILE:WINDOWS")
    parser.add_argument("--options", default="", help="further words for endor pack")
    parser.add_argument("--plot", type=Path, help="picture to draw at the end (.svg, .png, .pdf)")
    chosen = parser.parse_args()
    chosen.options = chosen.options.split()
    have = load(chosen.out)
    done = {(entry["method"], entry["cell"], tuple(entry["options"])) for entry in have}
    for cell in chosen.cells:
        for method in chosen.methods:
            if (method, cell, tuple(chosen.options)) not in done:
                record = measure(chosen, method, cell)
                with chosen.out.open("a") as file:
                    file.write(json.dumps(record) + "\n")
    if chosen.plot:
        alike = [one for one in load(chosen.out) if one["options"] == chosen.options]
        plot(alike, Path(chosen.texts[0].rpartition(":")[0]).stem, chosen.plot)


def load(path: Path) -> list[dict[str, Any]]:
    """Return the records of a file, none if it is not there."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


if __name__ == "__main__":
    main()
