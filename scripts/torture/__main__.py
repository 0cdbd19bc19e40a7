"""Kill, starve and feed rubbish to Endor, and look whether its promises hold.

    python scripts/torture [--seconds 300] [--only kills,calls,faults,memory,files,directories]

Needs Linux and a C compiler. Prints a table; exits 1 when a promise was broken.
"""

import argparse
import json
import os
import platform
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import child

CAMPAIGNS = ("kills", "calls", "faults", "memory", "files", "directories")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=300, help="of the timed campaigns")
    parser.add_argument("--files", type=int, default=20_000, help="mutated packed files")
    parser.add_argument("--directories", type=int, default=5_000, help="mutated directories")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default=",".join(CAMPAIGNS))
    memory_folder = Path("/dev/shm")  # a kill needs no disk, and there fsync costs nothing
    parser.add_argument(
        "--folder", type=Path, default=memory_folder if memory_folder.is_dir() else None
    )
    parser.add_argument("--json", type=Path, help="also write the results here")
    chosen = parser.parse_args()
    wanted = chosen.only.split(",")
    child.preload()
    child.drop_shim()
    import torch
    from conversions import FAULTS, KILLS, conversions, fault_campaign, kill_campaign
    from conversions import memory_campaign as memory
    from mutants import directory_campaign, file_campaign

    torch.set_num_threads(1)
    work = Path(tempfile.mkdtemp(prefix="endor-torture-", dir=chosen.folder))
    (work / "tmp").mkdir()
    os.environ["TMPDIR"] = tempfile.tempdir = str(work / "tmp")
    timed = [name for name in wanted if name in CAMPAIGNS[:4]]
    share = chosen.seconds / max(1, len(timed))
    results = []
    try:
        if timed:
            found = conversions(work, language_model="kills" in wanted)
            plain = found[:5]
            runs = {
                "kills": lambda: kill_campaign(work, found, share, chosen.seed),
                "calls": lambda: fault_campaign(
                    work, plain, KILLS, "kill -9 at each call", share, chosen.seed
                ),
                "faults": lambda: fault_campaign(
                    work,
                    plain,
                    FAULTS,
                    "EIO, ENOSPC, EINTR, short at each call",
                    share,
                    chosen.seed,
                ),
                "memory": lambda: memory(work, share, chosen.seed),
            }
            results += [show(runs[name]()) for name in timed]
        if "files" in wanted:
            results.append(show(file_campaign(work, chosen.files, chosen.seed)))
        if "directories" in wanted:
            results.append(show(directory_campaign(work, chosen.directories, chosen.seed)))
    finally:
        shutil.rmtree(work)
    if chosen.json:
        record = {
            "time": time.strftime("%Y-%m-%d"),
            "cpu": _cpu(),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "results": [vars(result) for result in results],
        }
        chosen.json.write_text(json.dumps(record, indent=1) + "\n")
    sys.exit(any(result.failures for result in results))


def show(result: Any) -> Any:
    """Print a result and return it."""
    outcomes = ", ".join(f"{count} {name}" for name, count in sorted(result.outcomes.items()))
    print(
        f"{result.name}: {result.cases} cases ({outcomes}), {len(result.failures)} broken, "
        f"{result.seconds:.0f} s",
        flush=True,
    )
    for failure in result.failures[:20]:
        print(f"  {failure}", flush=True)
    return result


def _cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(": ")[2]
    return platform.processor()


if __name__ == "__main__":
    main()
