"""`make torture` at toy size."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
def test_the_campaigns_run(tmp_path):
    words = ["--seconds", "6", "--files", "100", "--directories", "60", "--seed", "7"]
    words += ["--only", "calls,faults,files,directories", "--json", str(tmp_path / "x.json")]
    command = [sys.executable, str(ROOT / "scripts" / "torture"), *words]
    result = subprocess.run(command, check=False, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
    lines = result.stdout.splitlines()
    assert len(lines) == 4, result.stdout
    assert all(" 0 broken" in line and ": 0 cases" not in line for line in lines), result.stdout
    assert (tmp_path / "x.json").exists()
