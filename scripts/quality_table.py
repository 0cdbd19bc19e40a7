"""The table and the picture of `quality_bench.py`'s records.

    python scripts/quality_table.py OUT.jsonl [MORE.jsonl] [--plot FILE.svg] [--pairs A,B ...]

Perplexity, what it is more than the dense model's (in percent, with the 95 % interval of the paired
differences of windows) and KL to the dense model (nats a token, same interval). A row measured on
fewer windows than another says on how many: its perplexity is theirs alone. A pair says how much
lower A's loss is than B's on the windows that both have, with the interval of a bootstrap.
"""

import argparse
import json
import math
from pathlib import Path
from typing import Any

import numpy as np

NAMES = {
    "ecq": "Endor `--bits`",
    "rtn": "Endor `--bits`, no calibration",
    "gptq": "GPTQ int{}, groups of {}",
    "hqq": "HQQ {} bits, groups of {}",
    "gguf": "GGUF {} (gguf package)",
    "llama": "GGUF {}, importance matrix",
    "dense": "dense",
}
DRAWS = 10_000
SIGMA = 1.96


def label(row: str) -> str:
    """Return what to call a row in the table."""
    kind, *words = row.split(":")
    if kind == "dir":
        return Path(words[0]).name
    return NAMES[kind].format(*words)


def texts_of(record: dict[str, Any]) -> list[str]:
    """Return the texts that a record was measured on."""
    return [name for name, value in record.items() if isinstance(value, dict)]


def table(records: list[dict[str, Any]]) -> str:
    """Return the records as Markdown, fewest bits first."""
    texts = texts_of(records[0])
    heads = "".join(f" {text}: perplexity | over dense | KL |" for text in texts)
    most = {text: max(one[text]["windows"] for one in records) for text in texts}
    lines = [f"| bits | what |{heads}", "|---" * (2 + 3 * len(texts)) + "|"]
    for record in sorted(records, key=lambda one: float(one["bits"])):
        cells = [f"{record['bits']:.2f}", label(record["row"])]
        for text in texts:
            found = record[text]
            more, error = found["nats_more"], SIGMA * found["nats_more_stderr"]
            low, high = math.expm1(more - error), math.expm1(more + error)
            dense = record["row"] == "dense"
            part = "" if found["windows"] == most[text] else f" ({found['windows']} windows)"
            cells += [
                f"{found['perplexity']:.2f}{part}",
                "" if dense else f"{low:+.1%} to {high:+.1%}",
                "0" if dense else f"{found['kl']:.4f} ± {SIGMA * found['kl_stderr']:.4f}",
            ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def compare(first: dict[str, Any], second: dict[str, Any], text: str) -> str:
    """Return how the loss of `first` differs from that of `second` on the same windows."""
    shared = min(one[text]["windows"] for one in (first, second))
    ours, theirs = (one[text]["window_nll"][:shared] for one in (first, second))
    change = np.subtract(ours, theirs)
    draws = np.random.default_rng(0).integers(0, change.size, (DRAWS, change.size))
    low, high = np.quantile(change[draws].mean(axis=1), [0.025, 0.975])
    wins = int((change < 0).sum())
    return (
        f"{first['row']} ({first['bits']:.2f} bits) against {second['row']} "
        f"({second['bits']:.2f}), {text}: {change.mean():+.4f} nats a token "
        f"({low:+.4f} to {high:+.4f}), lower in {wins} of {change.size} windows"
    )


def plot(records: list[dict[str, Any]], text: str, path: Path) -> None:
    """Draw perplexity on `text` against bits, a line through the rows of each method."""
    from endor.bench.plot import Point, quality

    dense = {one["row"]: one for one in records}.get("dense")
    if dense is None:
        raise SystemExit("--plot: needs the row dense")
    level = dense[text]["perplexity"]
    # By the difference to dense on the row's own windows, of which some rows have fewer.
    points = [
        Point(short(row), one["bits"], level * math.exp(one[text]["nats_more"]), series(row))
        for one in sorted(records, key=lambda one: -one[text]["nats_more"])
        if (row := one["row"]) != "dense"
    ]
    quality(points, path, title=f"{text}: perplexity, dense {level:.1f}")


def series(row: str) -> str:
    """Return the name of the line that a row is on."""
    kind, *words = row.split(":")
    names = {"ecq": "Endor --bits", "rtn": "Endor, no calibration", "gptq": "GPTQ", "hqq": "HQQ"}
    named = names | {"gguf": "GGUF, no importance matrix", "llama": "GGUF"}
    return named[kind] if kind in named else Path(words[0]).name


def short(row: str) -> str:
    """Return what tells a row from others on its line."""
    kind, *words = row.split(":")
    return "" if kind == "dir" else words[0]


def main() -> None:
    """Print the table; draw the picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("records", type=Path, nargs="+")
    parser.add_argument("--plot", type=Path, help="picture (.svg, .png, .pdf) of the first text")
    parser.add_argument("--pairs", nargs="*", default=[], help="two rows, with a comma between")
    chosen = parser.parse_args()
    found: dict[str, dict[str, Any]] = {}
    for path in chosen.records:
        for line in path.read_text(encoding="utf-8").splitlines():
            record = json.loads(line)
            found.setdefault(record["row"], record)
    records = list(found.values())
    if not records:
        parser.error(f"{chosen.records[0]}: no records; make some with quality_bench.py")
    print(table(records))
    for pair in chosen.pairs:
        first, _, second = pair.partition(",")
        if not {first, second} <= found.keys():
            parser.error(f"--pairs {pair}: not measured; there are {', '.join(sorted(found))}")
        for text in texts_of(records[0]):
            print(compare(found[first], found[second], text))
    if chosen.plot:
        plot(records, texts_of(records[0])[0], chosen.plot)


if __name__ == "__main__":
    main()
