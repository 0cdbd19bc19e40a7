"""The other distribution called endor, and what an editable install makes importable."""

import os
import subprocess
import sys
import tomllib
from importlib.metadata import distribution
from pathlib import Path

import pytest

import endor
from endor import namesake

ROOT = Path(endor.__file__).resolve().parent.parent


def record(folder: Path, command: str | None, name: str = "endor-0.9.0") -> Path:
    made = folder / f"{name}.dist-info"
    made.mkdir(parents=True)
    (made / "METADATA").write_text("Metadata-Version: 2.1\nName: endor\nVersion: 0.9.0\n")
    if command is not None:
        (made / "entry_points.txt").write_text(f"[console_scripts]\nendor = {command}\n")
    return made


def run(code: str, *path: Path, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    search = os.pathsep.join(str(item) for item in path)
    return subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": search},
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("command", ["endor.main:run", None])
def test_importing_says_in_one_sentence_that_another_endor_is_there(tmp_path, command):
    made = record(tmp_path, command)
    done = run("import endor; print(endor.__file__)", ROOT, tmp_path)
    assert done.returncode == 0
    said = [line for line in done.stderr.splitlines() if "EndorWarning" in line]
    assert len(said) == 1
    assert made.stem in said[0]
    assert "pip uninstall -y endor endor-sparse" in said[0]


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("endor-0.1.0", namesake.OWN_COMMAND),
        ("endorlabs-0.7.4", "endorlabs:main"),
        ("endor_sparse-0.2.0", namesake.OWN_COMMAND),
    ],
)
def test_other_names_and_the_former_own_name_are_nobody_else(tmp_path, name, command):
    record(tmp_path, command, name)
    done = run("import endor", ROOT, tmp_path)
    assert (done.returncode, done.stderr) == (0, "")


def test_folders_that_are_no_folders_are_passed_over(tmp_path):
    (tmp_path / "file.zip").write_bytes(b"")
    broken = record(tmp_path / "site", None)
    (broken / "entry_points.txt").write_bytes(b"\xff\xfe")
    folders = ["", str(tmp_path / "missing"), str(tmp_path / "file.zip"), str(tmp_path / "site")]
    assert namesake.find(folders) == broken
    assert namesake.find(folders[:-1]) is None


def test_beside_a_clone_called_endor_the_package_is_found(tmp_path):
    """A namespace package of the clone's folder must not win over the editable install."""
    (tmp_path / "endor").symlink_to(ROOT)
    done = run("import endor; print(endor.__version__)", cwd=tmp_path)
    assert (done.returncode, done.stdout.strip()) == (0, endor.__version__), done.stderr


def test_the_distribution_has_its_own_name_and_the_version_one_place():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["name"] == namesake.DISTRIBUTION
    assert "version" not in project
    assert distribution(namesake.DISTRIBUTION).version == endor.__version__
    assert project["scripts"] == {"endor": namesake.OWN_COMMAND}
