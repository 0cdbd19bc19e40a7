"""Run an `endor` command in a process of its own and measure it; imported by other scripts here."""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

_CHILD = """
import sys
from endor.cli.main import main
try:
    main()
finally:
    peak = [line for line in open("/proc/self/status") if line.startswith("VmHWM")][0]
    print("VmHWM_kB", peak.split()[1], file=sys.stderr)
"""


def run_endor(words: list[str | Path]) -> tuple[dict[str, Any], float, int]:
    """Run `endor WORDS --json`; return its object, seconds, and peak resident memory in bytes.

    Raises:
        SystemExit: The command failed; holds the end of what it said.
    """
    began = time.perf_counter()
    command = [sys.executable, "-c", _CHILD, *map(str, words), "--json"]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    seconds = time.perf_counter() - began
    if done.returncode:
        sys.exit(f"endor {' '.join(map(str, words))}\n{done.stderr[-3000:]}")
    peak = 1024 * int(done.stderr.rpartition("VmHWM_kB")[2].split()[0])
    return json.loads(done.stdout.strip().splitlines()[-1]), seconds, peak
