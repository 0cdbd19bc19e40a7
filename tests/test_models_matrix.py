"""`make models` on the popular models: none got worse than docs/models.md says."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "scripts" / "models_matrix"


def run(*words, timeout=600):
    command = [sys.executable, str(SCRIPT), *map(str, words)]
    return subprocess.run(command, check=False, capture_output=True, text=True, timeout=timeout)


@pytest.mark.slow
def test_popular_models(tmp_path):
    result = run("--quick", "--workers", 2, "--out", tmp_path / "found.jsonl")
    assert result.returncode == 0, result.stdout + result.stderr
    found = [json.loads(line) for line in (tmp_path / "found.jsonl").read_text().splitlines()]
    assert len(found) >= 40
    assert {record["status"] for record in found} == {"ok"}
    assert sum(bool(record.get("image")) for record in found) >= 6


@pytest.mark.slow
def test_a_row_that_gets_worse_fails(tmp_path):
    """The comparison, on results that say more than one model does."""
    name = "causal/GPT2LMHeadModel"
    record = {"name": name, "status": "ok", "packed_share": 0.1, "loaded_share": 2.0}
    recorded = tmp_path / "recorded.jsonl"
    recorded.write_text(json.dumps(record) + "\n")
    result = run("--only", f"^{name}$", "--recorded", recorded)
    assert result.returncode == 1, result.stdout + result.stderr
    assert f"{name}: loaded_share was 2.0, is " in result.stdout
    assert "1 ok" in result.stdout.splitlines()[-1]


def test_the_page_is_of_the_recorded_results():
    code = "import page; assert page.PAGE.read_text() == page.page(page.read_results(page.RESULTS))"
    code = f"import sys; sys.path.insert(0, {str(SCRIPT)!r}); {code}"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
