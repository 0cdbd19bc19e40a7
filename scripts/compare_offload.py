"""Make the checkpoints of docs/benchmarks/offload.md and run its comparison.

    python scripts/compare_offload.py WORK --results WORK/results.jsonl
    python scripts/compare_offload.py WORK --results WORK/results.jsonl --markdown

WORK needs 20 GB. Steps that are done are not done again; `--only NAME` runs one part. AirLLM needs
an environment of its own: `--airllm-python PATH` names its interpreter, without it that peer is
left out.
"""

import argparse
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch; the children get the same

import endor
from endor.bench.generation.case import GenerateCase, GenerateRecord
from endor.bench.generation.generate import generate
from endor.bench.generation.plot import comparison
from endor.cli.bench_generate import summary
from endor.codecs import CodecChoice
from endor.quantization import QuantizeOptions

SCRIPTS = Path(__file__).resolve().parent
HALF = 2_057_000_000
"""Half of the dense bytes."""


@dataclass(frozen=True)
class Part:
    """One table: a packed checkpoint, its dense twin, a budget, peers."""

    packed: str
    dense: str
    ram_bytes: int
    against: tuple[str, ...]
    cold: bool = True
    tokens: int = 6
    rounds: int = 3


PARTS = {
    "disk-pruned": Part("pruned", "pruned-dense", 260_000_000, ("accelerate-disk", "airllm")),
    "disk-lossless": Part("lossless", "source", 300_000_000, ("accelerate-disk",)),
    "half-pruned": Part("pruned", "pruned-dense", HALF, ("accelerate-disk",)),
    "ram-pruned": Part("pruned", "pruned-dense", 8 << 30, ("dense",), cold=False, tokens=24),
    "ram-pruned-raw": Part(
        "pruned-raw", "pruned-dense", 8 << 30, ("dense",), cold=False, tokens=24
    ),
    "ram-lossless": Part("lossless", "source", 8 << 30, ("dense",), cold=False, tokens=24),
    "disk-bits": Part("bits", "bits-dense", 260_000_000, ("accelerate-disk",)),
    "ram-bits": Part("bits", "bits-dense", 8 << 30, ("dense",), cold=False, tokens=24),
}


def prepare(work: Path) -> None:
    """Make what is missing of the checkpoints."""
    source = work / "source"
    if not (source / "tokenizer.json").exists():
        subprocess.run([sys.executable, SCRIPTS / "make_model", "random", source], check=True)
    packings: tuple[tuple[str, str | None, CodecChoice], ...] = (
        ("pruned", "magnitude", "auto"),
        ("pruned-raw", "magnitude", "raw"),
        ("lossless", None, "auto"),
    )
    for name, prune, codec in packings:
        if not (work / name).exists():
            endor.pack_checkpoint(source, work / name, prune=prune, codec=codec, resume=True)
    if not (work / "bits").exists():
        endor.pack_checkpoint(
            source, work / "bits", quantize=QuantizeOptions(bits=3.5), calibrate=False, resume=True
        )
    for name in ("pruned", "bits"):
        if not (work / f"{name}-dense").exists():
            endor.unpack_checkpoint(work / name, work / f"{name}-dense", resume=True)


def run(work: Path, name: str, airllm_python: str | None, rounds: int) -> list[GenerateRecord]:
    """Run one part and draw its picture."""
    part = PARTS[name]
    against = tuple(peer for peer in part.against if peer != "airllm" or airllm_python)
    records = generate(
        GenerateCase(
            packed=work / part.packed,
            dense=work / part.dense,
            ram_bytes=part.ram_bytes,
            against=against,
            cold=part.cold,
            tokens=part.tokens,
            rounds=rounds or part.rounds,
            work=work,
            airllm_python=airllm_python,
            report=work / f"{name}.html",
        ),
        progress=lambda text: print(f"{name}: {text}", file=sys.stderr, flush=True),
    )
    comparison(records, work / f"{name}.png")
    return records


def markdown(results: Path) -> str:
    """Return the tables of the page; of a part that ran several times, the last run."""
    parts: dict[str, dict[str, dict[str, Any]]] = {}
    for line in results.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        if record["system"] == "endor":
            parts[record["part"]] = {}
        parts[record["part"]][record["system"]] = record
    lines = []
    for name in sorted(parts, key=list(PARTS).index):
        systems = parts[name]
        ours, last = systems["endor"], list(systems.values())[-1]
        base = systems.get("accelerate-disk") or systems.get("dense") or last
        place = ours["environment"]
        lines += [
            f"### {name}: `{ours['model']}`, {ours['ram_bytes'] / 1e9:.2f} GB of memory, "
            f"{ours['page_cache']} page cache",
            f"{place['device']}, {ours['threads']} threads, {ours['rounds']} processes each, "
            f"prompt {ours['prompt_tokens']}, {ours['tokens']} tokens, `{place['git_rev']}`.",
            "",
            f"| system | s a step (p20..p80) | tokens/s | against {base['system']} | predicted "
            "| GB from disk a step | peak private GB | bits equal |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for record in systems.values():
            if record["missing"]:
                lines.append(f"| {record['system']} | not measured: {record['missing']} |||||||")
                continue
            seconds, expected = record["decode_s"], record["predicted_decode_s"]
            cells = [
                "raw O_DIRECT reads" if record["system"] == "raw" else record["system"],
                f"{seconds:.3f} ({record['decode_p20']:.3f}..{record['decode_p80']:.3f})",
                f"{record['tokens_per_s']:.3f}" if record["system"] != "raw" else "",
                f"{base['decode_s'] / seconds:.2f}x" if record["system"] != "raw" else "",
                f"{expected:.3f} ({seconds / expected - 1:+.0%})" if expected else "",
                f"{record['disk_bytes_per_step'] / 1e9:.2f}",
                f"{record['anonymous_peak_bytes'] / 1e9:.2f}" if record["system"] != "raw" else "",
                {True: "yes", False: "no", None: ""}[record["equal"]],
            ]
            lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("work", type=Path)
    parser.add_argument("--only", choices=[*PARTS], action="append")
    parser.add_argument("--rounds", type=int, default=0, help="Processes per system.")
    parser.add_argument("--results", type=Path)
    parser.add_argument("--airllm-python")
    parser.add_argument("--markdown", action="store_true", help="Print the tables of --results.")
    args = parser.parse_args()
    if args.markdown:
        if args.results is None:
            parser.error("--markdown needs --results")
        print(markdown(args.results))
        return
    args.work.mkdir(parents=True, exist_ok=True)
    prepare(args.work)
    for name in args.only or PARTS:
        records = run(args.work, name, args.airllm_python, args.rounds)
        print(f"== {name}\n{summary(records)}\n", flush=True)
        if args.results:
            with args.results.open("a", encoding="utf-8") as file:
                for record in records:
                    file.write(json.dumps(record.to_dict() | {"part": name}) + "\n")


if __name__ == "__main__":
    main()
