"""The whole way with a real model: pack, verify, measure, generate.

    make demo

Works in `.demo/` and keeps what it made; a second run starts from there. Every step is an `endor`
command that is printed before it runs, so that it can be repeated by hand.
"""

import json
import os
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from endor.bench.plot import Bar, Point, bars, quality
from endor.checkpoint import inspect_checkpoint
from endor.cli.tables import table
from endor.machine import arithmetic

ROOT = Path(__file__).resolve().parent.parent
WORK = ROOT / ".demo"
MODEL = WORK / "smollm2"
RAW = WORK / "magnitude-50-raw"
WINDOWS = 8
QUESTION = "What is the capital of France, and what is it known for?"
SPARSITY = 0.5
CALIBRATED = "auto"
"""The best method, on few calibration windows: a few minutes."""
SAMPLES = 8
BITS = "3.5"
WEIGHTS = 135e6
TOKENS = 64
START_S = 8.0
"""What a command takes to import torch and transformers and to open a model, about."""


@dataclass(frozen=True, slots=True)
class Variant:
    """One checkpoint of the demonstration, the options it was packed with, and how it is run."""

    label: str
    path: Path
    options: tuple[str, ...]
    exact: bool = True
    fast: bool = True


VARIANTS = (
    Variant("dense bf16", MODEL, (), fast=False),
    Variant("endor, lossless", WORK / "lossless", ("--prune", "none")),
    Variant(
        "endor, magnitude 50 %",
        WORK / "magnitude-50",
        ("--prune", "magnitude", "--sparsity", str(SPARSITY)),
        exact=False,
    ),
    Variant(
        f"endor, {CALIBRATED} 50 %",
        WORK / f"{CALIBRATED}-50",
        ("--prune", CALIBRATED, "--sparsity", str(SPARSITY), "--samples", str(SAMPLES)),
        exact=False,
    ),
    Variant(
        f"endor, {BITS} bits",
        WORK / f"bits-{BITS}",
        ("--bits", BITS, "--samples", str(SAMPLES)),
        exact=False,
    ),
)


def endor(*arguments: str | Path, quiet: bool = False) -> str:
    """Run an `endor` command, shown first, and return its standard output."""
    words = [str(argument) for argument in arguments]
    shown = [os.path.relpath(word, ROOT) if word.startswith(str(ROOT)) else word for word in words]
    print(f"\n$ endor {shlex.join(shown)}", flush=True)
    command = [sys.executable, "-m", "endor.cli.main", *words]
    done = subprocess.run(command, check=False, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    if done.returncode:
        sys.exit(f"the command above failed with exit code {done.returncode}")
    if not quiet:
        print(done.stdout.rstrip(), flush=True)
    return done.stdout


def about(seconds: float, why: str) -> None:
    """Say how long the next step will take."""
    print(f"\nnext: about {seconds:.0f} s ({why})", flush=True)


def facts(*arguments: str | Path) -> dict[str, Any]:
    """Run an `endor` command with `--json` and return its object."""
    found: dict[str, Any] = json.loads(endor(*arguments, "--json", quiet=True))
    return found


def make_model() -> None:
    """Write the model as an ordinary Hugging Face checkpoint, once."""
    print(f"The model: SmolLM2-135M-Instruct, bf16, in {os.path.relpath(MODEL, ROOT)}", flush=True)
    script = ROOT / "scripts" / "make_model"
    subprocess.run([sys.executable, script, "smollm2", MODEL], check=True, cwd=ROOT)


def pack_all() -> None:
    """Pack the model in each way, and verify each result."""
    for variant in VARIANTS[1:]:
        if CALIBRATED in variant.options:
            print("\nnext: the longest step; it says how long it will take", flush=True)
        elif BITS in variant.options:
            print("\nnext: one or two minutes; it says how long it will take", flush=True)
        endor("pack", MODEL, variant.path, *variant.options, "--overwrite")
        lossless = variant.options == ("--prune", "none")
        endor("verify", variant.path, *(("--against", MODEL) if lossless else ()))
    # For the picture: the bitmap and plain values alone, as the other sparse formats store them.
    options = ("--prune", "magnitude", "--sparsity", str(SPARSITY), "--codec", "raw")
    endor("pack", MODEL, RAW, *options, "--overwrite")


def scores() -> list[dict[str, Any]]:
    """Return the perplexity of every variant, in order, from one command."""
    paths = [variant.path for variant in VARIANTS]
    flops = 2 * WEIGHTS * 512 * WINDOWS * len(paths)
    rate = arithmetic().float32_gflops
    about(flops / rate / 1e9 + START_S, f"{len(paths)} models at {rate:.0f} Gflop/s")
    # In float32: every CPU multiplies it fast, and not every one bfloat16.
    options = ("--max-windows", str(WINDOWS), "--dtype", "float32")
    lines = endor("eval", *paths, *options, "--json", quiet=True)
    return [json.loads(line) for line in lines.splitlines()]


def measure(variant: Variant, score: dict[str, Any]) -> dict[str, Any]:
    """Return size, perplexity and speed of one variant."""
    prompt = ["--prompt", QUESTION, "--chat", "--max-new-tokens", str(TOKENS)]
    exact = facts("generate", variant.path, *prompt) if variant.exact else None
    fast = facts("generate", variant.path, *prompt, "--fast") if variant.fast else None
    said = fast or exact
    assert said is not None, "each variant is run in one way at least"
    return {
        "variant": variant.label,
        "bytes": sum(path.stat().st_size for path in variant.path.glob("*.safetensors")),
        "bits_per_weight": score["bits_per_weight"],
        "perplexity": score["perplexity"],
        "exact_tokens_per_s": exact["decode_tokens_per_s"] if exact else None,
        "fast_tokens_per_s": fast["decode_tokens_per_s"] if fast else None,
        "text": said["text"].strip(),
    }


def show(rows: list[dict[str, Any]]) -> None:
    """Print the table."""
    header = ["", "MB", "bits/weight", "perplexity", "tokens/s", "tokens/s --fast"]
    cells = [
        [
            row["variant"],
            f"{row['bytes'] / 1e6:.1f}",
            f"{row['bits_per_weight']:.2f}",
            f"{row['perplexity']:.2f}",
            f"{row['exact_tokens_per_s']:.1f}" if row["exact_tokens_per_s"] else "-",
            f"{row['fast_tokens_per_s']:.1f}" if row["fast_tokens_per_s"] else "-",
        ]
        for row in rows
    ]
    print(f"\n{table(header, cells)}")
    print(
        "MB: all weight files. bits/weight: the packed matrices, metadata and padding included.\n"
        f"perplexity: {WINDOWS} windows of 512 tokens of 'Persuasion' (not seen in calibration).\n"
        "A model of 135 million weights suffers far more from pruning than a large one: read the\n"
        "perplexities as a ranking of methods. Lossless packing changes no bit of the output.\n"
        "This model was made from a file of 4-bit weights, which fits quantised values oddly.",
        flush=True,
    )


def bitmask_bits_per_weight() -> float:
    """Return what compressed-tensors' `sparse-bitmask` arrays would take for the same matrices.

    Per matrix: the non-zeros, a bitmask with whole bytes per row, an int64 offset per row, and the
    shape as two int64.
    """
    specs = [row.spec for row in inspect_checkpoint(RAW).rows if row.spec.codec != "dense"]
    size = 0
    for spec in specs:
        rows, cols = spec.shape
        size += spec.nnz * spec.dtype.itemsize + rows * (-(-cols // 8) + 8) + 16
    return 8 * size / sum(spec.numel for spec in specs)


def draw(rows: list[dict[str, Any]]) -> None:
    """Save two pictures: sizes beside other formats, and quality against size."""
    bitmask = bitmask_bits_per_weight()
    entries = [
        Bar("dense bf16", 16.0, False, "16.00"),
        Bar("DFloat11, lossless (published)", 10.9, False, "10.9"),
        Bar("compressed-tensors bitmask, 50 % (computed)", bitmask, False, f"{bitmask:.2f}"),
    ]
    raw = inspect_checkpoint(RAW).sizes.bits_per_weight
    entries.append(Bar("endor, codec raw, 50 %", raw, True, f"{raw:.2f}"))
    entries += [
        Bar(row["variant"], row["bits_per_weight"], True, f"{row['bits_per_weight']:.2f}")
        for row in rows[1:]
    ]
    sizes = WORK / "sizes.png"
    bars(
        entries,
        sizes,
        title="Bits per weight of the packed matrices",
        axis="bits per weight, all metadata included",
        footnote="Blue: measured on SmolLM2-135M. Grey: other formats; computed ones at the "
        "same density, published ones as their authors state.",
    )
    points = [Point(row["variant"], row["bits_per_weight"], row["perplexity"]) for row in rows]
    chart = WORK / "quality.png"
    quality(points, chart, title="SmolLM2-135M: perplexity on 'Persuasion' against size")
    print(f"\npictures: {os.path.relpath(sizes, ROOT)}, {os.path.relpath(chart, ROOT)}")


def main() -> None:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    began = time.perf_counter()
    make_model()
    pack_all()
    found = scores()
    runs = sum(variant.exact + variant.fast for variant in VARIANTS)
    about(runs * (START_S + TOKENS / 10), f"{TOKENS} tokens from {runs} models, one by one")
    rows = [measure(*pair) for pair in zip(VARIANTS, found, strict=True)]
    for row in (rows[1], rows[-1]):
        print(f"\nAn answer from {row['variant']}:\n{row['text']}")
    show(rows)
    draw(rows)
    (WORK / "results.json").write_text(json.dumps(rows, indent=2) + "\n")
    print(f"done in {time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
