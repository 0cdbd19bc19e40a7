"""After its work torch leaves the processors to others, once Endor has seen to that."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from endor import openmp
from endor.planning import Placement, Tier

from .support.packed_files import make_packed

BURN = """
import os, sys, threading, time
import torch
from endor import openmp

def tasks():
    return len(os.listdir("/proc/self/task"))

def burnt():
    values, total = torch.ones(1 << 22), 0.0
    for _ in range(20):
        values.add_(1)
        before = time.process_time()
        time.sleep(0.01)
        total += time.process_time() - before
    return total

torch.set_num_threads(2)
before, count = burnt(), tasks()
saw = openmp.settle()
again = openmp.settle()
after = burnt()
idle = sum(thread.name == "openmp-idle" for thread in threading.enumerate())
print(saw, again, idle, tasks() - count, before, after)
"""


def burn(**environment: str) -> tuple[bool, bool, int, int, float, float]:
    """Return what settling said twice, threads made, and CPU seconds while the process slept."""
    drop = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "OMP_NUM_THREADS")
    kept = {name: value for name, value in os.environ.items() if name not in drop}
    ran = subprocess.run(
        [sys.executable, "-c", BURN],
        env={**kept, **environment},
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    saw, again, idle, tasks, before, after = ran.stdout.split()
    return (
        saw == "True",
        again == "True",
        int(idle),
        int(tasks),
        float(before),
        float(after),
    )


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="nothing spins on one processor")
def test_threads_sleep_soon() -> None:
    saw, again, idle, tasks, before, after = burn()
    if not saw:
        pytest.skip("this torch has no libgomp")
    assert not again
    assert idle == 1
    assert tasks >= 2
    if before < 0.01:
        pytest.skip(f"threads spin for {before:.4f} s here: nothing to end")
    assert after < before / 4


@pytest.mark.parametrize(
    "setting", [("OMP_WAIT_POLICY", "ACTIVE"), ("GOMP_SPINCOUNT", "1000")], ids=lambda s: s[0]
)
def test_what_the_environment_says_holds(setting: tuple[str, str]) -> None:
    saw, again, idle, tasks, *_ = burn(**{setting[0]: setting[1]})
    assert (saw, again, idle, tasks) == (False, False, 0, 0)


@pytest.mark.parametrize(
    ("shape", "tier", "settles"),
    [
        ((1024, 1088), "resident", True),
        ((1024, 1088), "dense", False),
        ((1024, 1024), "resident", False),
    ],
)
def test_it_is_for_matrices_that_threads_share(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    shape: tuple[int, int],
    tier: Tier,
    settles: bool,
) -> None:
    calls: list[bool] = []
    monkeypatch.setattr(openmp, "settle", lambda: calls.append(True))
    packed = make_packed(tmp_path / "w.safetensors", [shape, (8, 64)])
    names = [unit.name for unit in packed.units]
    packed.store(Placement(dict.fromkeys(names, tier), packed.largest)).close()
    assert bool(calls) == settles
