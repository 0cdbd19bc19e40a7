"""Worker processes that outlive neither a crash nor a model that hangs."""

import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any

HERE = Path(__file__).resolve().parent
BATCH = 60
"""Models of one process; what they leave in memory goes with it."""

STUCK_S = 90
"""Silence after which a process is killed: longer than a model's own limit."""

Record = dict[str, Any]


def run_all(names: Sequence[str], *, workers: int = 1) -> dict[str, Record]:
    """Return a record per name.

    Args:
        names: Of entries.
        workers: Processes at once, each on one thread.
    """
    batches: queue.SimpleQueue[list[str]] = queue.SimpleQueue()
    for at in range(0, len(names), BATCH):
        batches.put(list(names[at : at + BATCH]))
    found: dict[str, Record] = {}

    def work() -> None:
        while not batches.empty():
            try:
                left = batches.get_nowait()
            except queue.Empty:
                return
            while left:
                done = _run_batch(left)
                found.update(done)
                left = [name for name in left if name not in done]
                print(f"{len(found)} of {len(names)}", file=sys.stderr, flush=True)

    threads = [threading.Thread(target=work) for _ in range(workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    library = version("transformers")
    return {name: found[name] | {"transformers": library} for name in names}


def _run_batch(names: Sequence[str]) -> dict[str, Record]:
    """Return what a process finished; the model that it died of or hangs on is among it."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done: dict[str, Record] = {}
    begun = names[0]
    with subprocess.Popen(
        [sys.executable, str(HERE / "worker.py")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=environment,
        text=True,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write("".join(f"{name}\n" for name in names))
        process.stdin.close()
        lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        threading.Thread(target=_forward, args=(process.stdout, lines), daemon=True).start()
        how = "the process died of it"
        while True:
            try:
                line = lines.get(timeout=STUCK_S)
            except queue.Empty:
                how = f"hangs: nothing for {STUCK_S} s"
                process.kill()
                break
            if line is None:
                break
            record = json.loads(line)
            if "begun" in record:
                begun = record["begun"]
            else:
                done[record["name"]] = record
    if len(done) < len(names) and begun not in done:
        status = "crash" if process.returncode != 1 else "error"
        done[begun] = {"name": begun, "status": status, "reason": f"{how} ({process.returncode})"}
    return done


def _forward(stream: IO[str], lines: "queue.SimpleQueue[str | None]") -> None:
    for line in stream:
        lines.put(line)
    lines.put(None)
