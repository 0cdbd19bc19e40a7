#!/usr/bin/env python3
"""Run the CPU benchmarks and put their tables into docs/benchmarks/cpu.md.

    python scripts/bench_cpu.py [--dir DIRECTORY]

Takes about ten minutes; leave the machine alone meanwhile. The tables replace what stands between
the two markers in the document; the records go to docs/benchmarks/results/bench-cpu.jsonl.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DOCUMENT = ROOT / "docs" / "benchmarks" / "cpu.md"
RECORDS = ROOT / "docs" / "benchmarks" / "results" / "bench-cpu.jsonl"
BEGIN, END = "<!-- begin tables -->\n", "<!-- end tables -->\n"


def commands(directory: Path, cores: int) -> list[list[str]]:
    """Return the arguments of each `endor bench` run."""
    found = [
        [bench, "--threads", str(threads)]
        for bench in ("decode", "pack", "matvec")
        for threads in sorted({1, cores})
    ]
    found += [["matvec", "--threads", "1", "--batch", "4"]]
    found += [[bench, "--threads", "1", "--density", "0.3"] for bench in ("decode", "matvec")]
    return [*found, ["io", "--dir", str(directory)]]


def run(arguments: list[str], records: Path) -> str:
    """Run one benchmark and return its section of the document."""
    load = os.getloadavg()[0]
    command = [sys.executable, "-m", "endor.cli.main", "bench", *arguments, "--json", str(records)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    # The directory is this machine's business.
    title = "io" if arguments[0] == "io" else " ".join(arguments)
    print(done.stdout, flush=True)
    return (
        f"### `endor bench {title}`\n{date.today().isoformat()}, load average {load:.1f} at the "
        f"start.\n\n```\n{done.stdout.rstrip()}\n```\n\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--dir", type=Path, default=Path(tempfile.gettempdir()), help="the disk that io measures"
    )
    directory = parser.parse_args().dir
    before, _, rest = DOCUMENT.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    cores = len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as scratch:
        records = Path(scratch) / RECORDS.name
        sections = "".join(run(arguments, records) for arguments in commands(directory, cores))
        RECORDS.parent.mkdir(exist_ok=True)
        RECORDS.write_bytes(records.read_bytes())
    DOCUMENT.write_text(f"{before}{BEGIN}\n{sections}{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
