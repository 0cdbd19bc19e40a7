"""Make the checkpoints of docs/benchmarks/offload.md and run its comparison.

    python scripts/compare_offload.py WORK --results WORK/results.jsonl

WORK needs 20 GB. Steps that are done are not done again; `--only NAME` runs one part. AirLLM needs
an environment of its own: `--airllm-python PATH` names its interpreter, without it that peer is
left out.
"""

import argparse
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch; the children get the same

import endor
from endor.bench.generate import GenerateCase, GenerateRecord, generate
from endor.bench.offload_plot import comparison
from endor.cli.bench_generate import summary
from endor.codecs import CodecChoice

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
}


def prepare(work: Path) -> None:
    """Make what is missing of the checkpoints."""
    source = work / "source"
    if not (source / "tokenizer.json").exists():
        os.spawnl(
            os.P_WAIT,
            sys.executable,
            sys.executable,
            str(SCRIPTS / "make_random_llama.py"),
            str(source),
        )
    packings: tuple[tuple[str, str | None, CodecChoice], ...] = (
        ("pruned", "magnitude", "auto"),
        ("pruned-raw", "magnitude", "raw"),
        ("lossless", None, "auto"),
    )
    for name, prune, codec in packings:
        if not (work / name).exists():
            endor.pack_checkpoint(source, work / name, prune=prune, codec=codec, resume=True)
    if not (work / "pruned-dense").exists():
        endor.unpack_checkpoint(work / "pruned", work / "pruned-dense", resume=True)


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


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("work", type=Path)
    parser.add_argument("--only", choices=[*PARTS], action="append")
    parser.add_argument("--rounds", type=int, default=0, help="Processes per system.")
    parser.add_argument("--results", type=Path)
    parser.add_argument("--airllm-python")
    args = parser.parse_args()
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
