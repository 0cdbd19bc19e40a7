#!/usr/bin/env python3
"""Run the CPU benchmarks and put their tables into docs/benchmarks/cpu.md.

    python scripts/bench_cpu.py [--dir DIRECTORY | --no-io]

Takes about ten minutes; leave the machine alone meanwhile. Each kernel has tables of its own: those
of the one that runs replace what stands between its two markers in the document, and the records go
to docs/benchmarks/results/bench-cpu-KERNEL.jsonl.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path

from endor.kernels import describe

ROOT = Path(__file__).resolve().parent.parent
DOCUMENT = ROOT / "docs" / "benchmarks" / "cpu.md"
RESULTS = ROOT / "docs" / "benchmarks" / "results"


def commands(directory: Path | None, cores: int) -> list[list[str]]:
    """Return the arguments of each `endor bench` run; of the disk too, given a directory."""
    found = [
        [bench, "--threads", str(threads)]
        for bench in ("decode", "pack", "matvec")
        for threads in sorted({1, cores})
    ]
    found += [["matvec", "--threads", "1", "--batch", "4"]]
    found += [[bench, "--threads", "1", "--density", "0.3"] for bench in ("decode", "matvec")]
    return found if directory is None else [*found, ["io", "--dir", str(directory)]]


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
    parser.add_argument("--no-io", action="store_true", help="leave the disk out")
    options = parser.parse_args()
    directory = None if options.no_io else options.dir
    kernel = describe()["kernel"]
    begin, end = f"<!-- begin tables of {kernel} -->\n", f"<!-- end tables of {kernel} -->\n"
    before, found, rest = DOCUMENT.read_text(encoding="utf-8").partition(begin)
    if not found:
        sys.exit(f"{DOCUMENT}: has no place for tables of {kernel}: add the markers {begin}{end}")
    _, _, after = rest.partition(end)
    cores = len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as scratch:
        records = Path(scratch) / f"bench-cpu-{kernel}.jsonl"
        sections = "".join(run(arguments, records) for arguments in commands(directory, cores))
        (RESULTS / records.name).write_bytes(records.read_bytes())
    DOCUMENT.write_text(f"{before}{begin}\n{sections}{end}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
