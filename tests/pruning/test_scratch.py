"""What a killed calibrated run leaves in TMPDIR goes away with the next one, and nothing else."""

import os
import signal
import subprocess
import sys
import tempfile

import pytest

from endor.pruning.scratch import ScratchFolder, remove_stale_folders

MAKE = """
import sys
from endor.pruning.scratch import ScratchFolder
folder = ScratchFolder()
(folder.path / "layer-00000.safetensors").write_text("x")
(folder.path / "tmp0_ab12").write_text("x")
print(folder.path, flush=True)
sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def temporary(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_what_the_dead_left_is_removed(tmp_path):
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    children = []
    for _ in range(2):
        child = subprocess.Popen(
            [sys.executable, "-c", MAKE],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        children.append(child)
    dead = children[1]
    paths = [tmp_path / child.stdout.readline().strip() for child in children]
    try:
        dead.send_signal(signal.SIGKILL)
        dead.wait(30)
        others = [tmp_path / name for name in ("endor-prune-a", "endor-prune-b", "endor-x")]
        for path in others:
            path.mkdir()
        (others[0] / ".lock").touch()
        (others[0] / "thesis.txt").write_text("mine")
        (tmp_path / "endor-prune-link").symlink_to(others[2])
        (tmp_path / "endor-prune-file").touch()
        mine = ScratchFolder()
        assert not paths[1].exists()
        assert paths[0].exists()
        assert (others[0] / "thesis.txt").exists()
        assert all(path.exists() for path in others)
        mine.remove()
        mine.remove()
        assert not mine.path.exists()
        os.utime(others[1], (1, 1))
        assert remove_stale_folders() == [others[1]]
    finally:
        for child in children:
            child.communicate()
    assert remove_stale_folders() == [paths[0]]


def test_another_users_folder_stays(tmp_path, monkeypatch):
    folder = ScratchFolder()
    os.close(folder._lock)
    folder._lock = -1
    with monkeypatch.context() as patch:
        patch.setattr(os, "geteuid", lambda: os.getuid() + 1)
        assert remove_stale_folders() == []
    assert remove_stale_folders() == [folder.path]
