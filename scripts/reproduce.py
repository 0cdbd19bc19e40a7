"""Run what makes a page of docs/benchmarks.

    python scripts/reproduce.py PAGE WORK [--dry-run]

PAGE is cpu, experts, gpu, offload, planned, pruning or quality. Models, packed checkpoints and
records go to WORK; the pages say how long it takes and what room it needs. A step whose result is
there already goes on with it, or is quick. --dry-run prints the commands, as a shell would take
them.
"""

import argparse
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PERSUASION = "endor/data/austen_persuasion.txt"

Command = list[str]


def script(name: str, *words: str) -> Command:
    """Return the command that runs one of the scripts with this interpreter."""
    return [sys.executable, f"scripts/{name}", *words]


def endor(*words: str) -> Command:
    """Return the command that runs `endor` with this interpreter."""
    return [sys.executable, "-m", "endor", *words]


def smollm2(work: str) -> Command:
    """Return the command that makes the model of most pages."""
    return script("make_model", "smollm2", f"{work}/smollm2")


def cpu(work: str) -> list[Command]:
    """Every kernel's tables, and those of the disk that WORK is on; rewrites the page."""
    return [script("bench_cpu.py", "--dir", work)]


def experts(work: str) -> list[Command]:
    """A mixture of experts, and what caches of them would have had."""
    mixture, packed = f"{work}/mixture", f"{work}/mixture-packed"
    machines = ("rtx4060-laptop", "rtx4090")
    return [
        smollm2(work),
        script("make_model", "moe", f"{work}/smollm2", mixture),
        endor("pack", mixture, packed, "--include", "*experts*", "--overwrite"),
        script("expert_cache.py", packed),
        script("expert_cache.py", packed, "--places", *machines, "--device-rate", "1.7"),
        script("expert_cache.py", packed, "--places", *machines),
        script("expert_cache.py", packed, "--lossy", "--engine-tokens", "32"),
    ]


def gpu(work: str) -> list[Command]:
    """Everything that only a CUDA device can tell."""
    return [["scripts/gpu_check.sh", f"{work}/gpu"]]


def offload(work: str) -> list[Command]:
    """Endor beside other ways to run what does not fit, without AirLLM."""
    compare = ("compare_offload.py", f"{work}/offload", "--results", f"{work}/offload.jsonl")
    return [script(*compare), script(*compare, "--markdown")]


def planned(work: str) -> list[Command]:
    """Predictions for machines that are not at hand; rewrites the page."""
    return [script("planned.py")]


def pruning(work: str) -> list[Command]:
    """The table of methods, and the memory of one run."""
    methods = ("magnitude", "wanda", "sparsegpt", "admm", "alps", "auto")
    return [
        smollm2(work),
        script(
            "prune_bench.py",
            f"{work}/smollm2",
            f"{work}/pruned",
            f"{work}/pruning.jsonl",
            *("--methods", *methods),
            *("--cells", "0.5", "0.6", "0.7", "2:4"),
            *("--texts", f"{PERSUASION}:8"),
            *("--options", "--samples 32 --no-sequential --calibration wiki"),
            *("--plot", f"{work}/pruning.svg"),
        ),
        script("prune_memory.py", f"{work}/memory", "--method", "admm", "--samples", "4"),
    ]


def quality(work: str) -> list[Command]:
    """Quantisation beside other people's, on the shipped text."""
    rows = "dense ecq:2 ecq:2.5 ecq:3 ecq:3.5 ecq:4 rtn:4 gptq:3:64 gptq:4:64 gguf:Q4_0 gguf:Q5_0"
    return [
        smollm2(work),
        script("rescale.py", f"{work}/smollm2", f"{work}/rescaled"),
        script(
            "quality_bench.py",
            f"{work}/rescaled",
            f"{work}/quality.jsonl",
            *("--samples", "32"),
            *("--statistics", f"{work}/statistics.pt"),
            *("--rows", *rows.split()),
            *("--texts", f"{PERSUASION}:40"),
        ),
        script("quality_table.py", f"{work}/quality.jsonl", "--plot", f"{work}/quality.svg"),
    ]


PAGES: dict[str, Callable[[str], list[Command]]] = {
    "cpu": cpu,
    "experts": experts,
    "gpu": gpu,
    "offload": offload,
    "planned": planned,
    "pruning": pruning,
    "quality": quality,
}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("page", choices=PAGES)
    parser.add_argument("work", type=Path)
    parser.add_argument("--dry-run", action="store_true")
    chosen = parser.parse_args()
    work = chosen.work.absolute()
    commands = PAGES[chosen.page](str(work))
    if not chosen.dry_run:
        work.mkdir(parents=True, exist_ok=True)
    for command in commands:
        print(shlex.join(command), flush=True)
        if not chosen.dry_run:
            code = subprocess.run(command, cwd=ROOT, check=False).returncode
            if code:
                return code
    return 0


if __name__ == "__main__":
    sys.exit(main())
