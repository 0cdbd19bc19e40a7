"""Packing on a Ray cluster."""

import os
import signal
import subprocess
import sys
from contextlib import suppress

import pytest

import endor
from endor.errors import BackendError, BusyError
from endor.packing import distributed, pack_checkpoint
from endor.packing.shares import Share, pack_share
from tests.hub.test_located import files


def test_without_ray(monkeypatch, model, tmp_path):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(BackendError, match="needs Ray; install it"):
        endor.pack_distributed(model, tmp_path / "out")


def test_a_lock_that_outlives_its_worker(model, tmp_path, monkeypatch):
    """Who packs a share again waits until the lost one's lock is gone."""
    busy = [BusyError("another process"), BusyError("another process")]

    def once(*arguments, **options):
        if busy:
            raise busy.pop()
        return pack_share(*arguments, **options)

    monkeypatch.setattr(distributed, "pack_share", once)
    monkeypatch.setattr(distributed.time, "sleep", lambda seconds: None)
    assert distributed._pack_one(str(model), str(tmp_path / "out"), 1, 2, {}) > 0
    assert not busy


def test_two_of_one_share(model, tmp_path):
    """A share that another process packs is busy, and says so."""
    script = (
        "import sys, time\n"
        "from endor.checkpoint.partial import Partial\n"
        "from pathlib import Path\n"
        "Path(sys.argv[1]).parent.mkdir()\n"
        "part = Partial(Path(sys.argv[1]), ())\n"
        "part.make()\n"
        "print('held', flush=True)\n"
        "time.sleep(60)\n"
    )
    share = tmp_path / "out.shares/00001-of-00002"
    process = subprocess.Popen([sys.executable, "-c", script, str(share)], stdout=subprocess.PIPE)
    try:
        assert process.stdout.readline() == b"held\n"
        with pytest.raises(BusyError, match="another process is writing it"):
            pack_share(model, tmp_path / "out", Share(1, 2))
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
    pack_share(model, tmp_path / "out", Share(1, 2))


SCRIPT = """
import os, sys, time
import ray
from ray.cluster_utils import Cluster
import endor
model, out, mark = sys.argv[1:]
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
second = cluster.add_node(num_cpus=1)
ray.init(address=cluster.address, log_to_driver=False)
killed = []

def progress(done, total):
    print(done, total, flush=True)
    if done == 2 and not killed:
        killed.append(cluster.remove_node(second, allow_graceful=False))

endor.pack_distributed(model, out, shares=8, progress=progress, max_shard_bytes=1 << 20)
assert killed
try:
    endor.pack_distributed(model, out + "-no", shares=2, prune="wanda")
except endor.EndorError as error:
    print("refused:", type(error).__name__, flush=True)
ray.shutdown()
cluster.shutdown()
"""


@pytest.mark.slow
def test_a_node_that_dies(model, tmp_path):
    """Two nodes, of which one is killed in the middle: the bytes of a local run, all the same."""
    pytest.importorskip("ray", reason="Ray is not installed")
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(model), str(tmp_path / "out"), "mark"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env={**os.environ, "RAY_DEDUP_LOGS": "0", "OMP_NUM_THREADS": "1"},
    )
    try:
        said, _ = process.communicate(timeout=500)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert process.returncode == 0, said
    assert "8 8" in said
    assert "refused: ConfigError" in said
    pack_checkpoint(model, tmp_path / "here", max_shard_bytes=1 << 20)
    assert files(tmp_path / "out") == files(tmp_path / "here")
