"""Endor's helpers run where OpenMP's threads are, although the main thread is bound to one CPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from endor.kernels import native

PROGRAM = """
import json, os
from pathlib import Path
from endor_vllm.processors import start_helpers
threads = start_helpers()
seen = {
    task.name: sorted(os.sched_getaffinity(int(task.name)))
    for task in Path("/proc/self/task").iterdir()
}
print(json.dumps([threads, sorted(os.sched_getaffinity(0)), list(seen.values())]))
"""

ALLOWED = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
pytestmark = [
    pytest.mark.skipif(len(ALLOWED) < 2, reason="needs two processors"),
    pytest.mark.skipif(not native.available(), reason="the compiled kernels are not here"),
]


def run(**more: str) -> list:
    environment = {k: v for k, v in os.environ.items() if k not in ("ENDOR_THREADS",)}
    environment |= {"PYTHONPATH": str(Path(__file__).resolve().parent.parent)} | more
    environment.pop("OMP_NUM_THREADS", None)
    found = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=True
    )
    return json.loads(found.stdout)


def test_bound_threads_are_found():
    two = ALLOWED[:2]
    threads, main, seen = run(GOMP_CPU_AFFINITY=" ".join(map(str, two)))
    if main != two[:1]:
        pytest.skip("this torch's OpenMP does not bind by GOMP_CPU_AFFINITY")
    assert threads == 2
    assert two in seen  # a helper of the kernels


def test_nothing_is_started_where_nothing_is_bound():
    threads, main, _ = run()
    assert threads is None
    assert main == ALLOWED


def test_a_number_that_was_asked_for_wins():
    assert run(GOMP_CPU_AFFINITY=" ".join(map(str, ALLOWED[:2])), ENDOR_THREADS="1")[0] is None
