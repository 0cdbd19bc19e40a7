"""scripts/gpu_check.sh without a device, a stub in place of each command: how it ends."""

import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "scripts" / "gpu_check.sh"

STUB = """#!{python}
import os, subprocess, sys, time
words = " ".join(sys.argv[1:])
with open(os.environ["STUB_LOG"], "a") as log:
    caching = os.environ.get("PYTORCH_NO_CUDA_MEMORY_CACHING", "")
    log.write(f"{{os.path.basename(sys.argv[0])}} {{words}} caching={{caching}}\\n")
if "gpu_report.py summary" in words:
    sys.exit(subprocess.run([{python!r}, *sys.argv[1:]]).returncode)
for rule in filter(None, os.environ.get("STUB_RULES", "").split(";")):
    part, code = rule.split("=")
    if part in words:
        time.sleep(60 if code == "hang" else 0)
        print("stub ends with", code)
        sys.exit(int(code))
"""


class Check:
    """The script with every command replaced by a stub that writes down how it was called."""

    def __init__(self, folder: Path) -> None:
        self.out, self._folder = folder / "out", folder
        self._bin = folder / "bin"
        self._bin.mkdir()
        for name in ("python-stub", "nvidia-smi", "compute-sanitizer"):
            stub = self._bin / name
            stub.write_text(STUB.format(python=sys.executable))
            stub.chmod(0o755)
        (folder / "tmp").mkdir()

    def run(self, *words: str, rules: str = "", seconds: int = 530) -> int:
        env = os.environ | {
            "PATH": f"{self._bin}:{os.environ['PATH']}",
            "PYTHON": str(self._bin / "python-stub"),
            "STUB_LOG": str(self._folder / "calls.txt"),
            "STUB_RULES": rules,
            "GPU_CHECK_SECONDS": str(seconds),
            "TMPDIR": str(self._folder / "tmp"),
        }
        command = ["bash", str(SCRIPT), str(self.out), *words]
        return subprocess.run(command, env=env, capture_output=True, check=False).returncode

    def without(self, name: str) -> None:
        (self._bin / name).unlink()

    @property
    def calls(self) -> list[str]:
        return (self._folder / "calls.txt").read_text().splitlines()

    @property
    def steps(self) -> dict[str, str]:
        found = json.loads((self.out / "results.json").read_text())["steps"]
        return {row["step"]: row["ended"] for row in found}

    def check_files(self) -> None:
        names = sorted(path.name for path in self.out.iterdir())
        assert names == ["logs.tar.gz", "results.json", "summary.md"]
        assert not list((self._folder / "tmp").iterdir()), "the scratch folder is left"
        with tarfile.open(self.out / "logs.tar.gz") as logs:
            assert "logs/steps.txt" in logs.getnames()


@pytest.fixture
def check(tmp_path: Path) -> Check:
    if shutil.which("timeout") is None:
        pytest.skip("no `timeout` (coreutils)")
    return Check(tmp_path)


def test_all_parts_in_order(check: Check):
    assert check.run() == 0
    order = ["device", "kernels", "bench-kernels", "bench-link", "model-tests", "model", "memcheck"]
    assert [*check.steps] == [*order, "racecheck"]
    assert set(check.steps.values()) == {"ok"}
    check.check_files()
    sanitized = [call for call in check.calls if call.startswith("compute-sanitizer")]
    assert all(call.endswith("caching=1") for call in sanitized)
    assert "pruning" not in " ".join(check.calls)


@pytest.mark.parametrize(
    ("part", "steps"),
    [
        ("kernels", ["kernels"]),
        ("bench", ["bench-kernels", "bench-link"]),
        ("model", ["model-tests", "model"]),
        ("sanitizer", ["memcheck", "racecheck"]),
        ("pruning", ["pruning"]),
    ],
)
def test_one_part(check: Check, part, steps):
    assert check.run("--part", part) == 0
    assert [*check.steps] == ["device", *steps]
    check.check_files()


def test_wrong_bits_end_it(check: Check):
    assert check.run(rules="test_gpu_kernels.py=1") == 1
    assert check.steps["kernels"] == "FAILED with code 1"
    assert "bench-kernels" not in check.steps
    assert "stub ends with 1" in (check.out / "summary.md").read_text()
    check.check_files()


def test_without_a_device_it_says_so(check: Check):
    assert check.run(rules="gpu.require=1") == 1
    assert [*check.steps] == ["device"]
    check.check_files()


def test_a_failed_step_does_not_stop_the_next(check: Check):
    assert check.run("--part", "bench", rules="gpu_report.py kernels=3") == 1
    assert check.steps["bench-kernels"] == "FAILED with code 3"
    assert check.steps["bench-link"] == "ok"


def test_what_hangs_is_ended(check: Check):
    assert check.run("--part", "kernels", rules="test_gpu_kernels.py=hang", seconds=45) == 1
    assert check.steps["kernels"].startswith("NOT ENDED")
    check.check_files()


def test_no_time_left(check: Check):
    """For a part: no failure. For the look at the device: nothing was checked at all."""
    assert check.run(seconds=20) == 1
    assert check.steps == {"device": "no time left"}


def test_a_missing_sanitizer_is_no_failure(check: Check):
    check.without("compute-sanitizer")
    assert check.run("--part", "sanitizer") == 0
    assert check.steps["sanitizer"].startswith("skipped")


def test_missing_c_kernels_are_no_failure(check: Check):
    assert check.run("--part", "kernels", rules="build_ext=1") == 0
    assert check.steps["build"].startswith("no C kernels")


def test_unknown_parts(check: Check):
    assert check.run("--part", "everything") == 2
    assert check.run("--parts", "model") == 2
    assert not check.out.exists()


def test_peers_that_fail(tmp_path, monkeypatch):
    """Another system's error is a row of the summary; one of Endor's is a failure."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import gpu_report

    from endor.bench.gpu import model

    ok = {
        "tokens_per_s": 1.0,
        "token_s": 1.0,
        "prefill_s": 1.0,
        "load_s": 1.0,
        "peak_vram_bytes": 1,
    }
    for failing, code in (("accelerate disk", 0), ("endor", 1)):
        monkeypatch.setattr(model, "make", lambda case, folder: {})
        answers = [
            {"system": name, "error": "no memory"} if name == failing else {"system": name, **ok}
            for name in model.SYSTEMS
        ]
        monkeypatch.setattr(model, "run", lambda case, folder, answers=answers: iter(answers))
        assert gpu_report.model(tmp_path) == code
        assert gpu_report.summary(tmp_path) == 0
        assert f"| {failing} | no memory |" in (tmp_path / "summary.md").read_text()
