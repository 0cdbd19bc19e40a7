"""What a release is made by: versions that agree, wheels for every Python, workflows that run."""

import importlib.util
import shutil
import tomllib
from pathlib import Path
from types import ModuleType

import pytest
import yaml

import endor
from endor.kernels import native

ROOT = Path(endor.__file__).resolve().parent.parent


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_versions_agree():
    release = script("release_version")
    assert release.problems(None) == []
    assert "v9.9.9" in release.problems("v9.9.9")[0]


def test_a_version_that_only_the_package_knows_is_refused(tmp_path, monkeypatch):
    release = script("release_version")
    (tmp_path / "endor").mkdir()
    (tmp_path / "endor" / "version.py").write_text('__version__ = "7.0"\n')
    (tmp_path / "CITATION.cff").write_text("version: 6.0\n")
    (tmp_path / "CHANGELOG.md").write_text("\n## [7.0.1]\n")
    monkeypatch.setattr(release, "ROOT", tmp_path)
    said = release.problems("v7.0")
    assert len(said) == 2
    assert "CITATION.cff" in said[0]
    assert "CHANGELOG.md" in said[1]


@pytest.mark.parametrize(
    ("changelog", "wrong"),
    [
        ("## [Unreleased]\n\n## [7.0] - 2026-11-26\n\n- new\n", None),
        ("## [7.0] - 2026-11-26\n\n- new\n", None),
        ("## [Unreleased]\n\n## [7.0] - not tagged yet\n\n- new\n", "the day of [7.0]"),
        ("## [Unreleased]\n\n- newer\n\n## [7.0] - 2026-11-26\n", "under [Unreleased]"),
    ],
)
def test_a_tag_needs_a_day_and_nothing_that_waits(tmp_path, monkeypatch, changelog, wrong):
    release = script("release_version")
    (tmp_path / "endor").mkdir()
    (tmp_path / "endor" / "version.py").write_text('__version__ = "7.0"\n')
    (tmp_path / "CITATION.cff").write_text("version: 7.0\n")
    (tmp_path / "CHANGELOG.md").write_text(f"# Changelog\n\n{changelog}")
    monkeypatch.setattr(release, "ROOT", tmp_path)
    assert release.problems(None) == []
    said = release.problems("v7.0")
    assert len(said) == (wrong is not None)
    assert wrong is None or wrong in said[0]


def test_the_workflows_try_every_python_that_is_promised():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    promised = [
        item.split(" :: ")[-1]
        for item in project["classifiers"]
        if item.startswith("Programming Language :: Python :: 3.")
    ]
    folder = ROOT / ".github" / "workflows"
    flows = {path.stem: yaml.safe_load(path.read_text()) for path in folder.glob("*.yml")}
    matrix = flows["ci"]["jobs"]["test"]["strategy"]["matrix"]
    assert matrix["python"] == promised
    assert (matrix["kernels"], matrix["versions"]) == (
        ["native", "numpy-only"],
        ["newest", "lowest"],
    )
    build = flows["wheels"]["jobs"]["build"]["steps"]
    assert build[1]["with"]["python-version"].split() == promised
    assert any(all(f"python{item}" in step.get("run", "") for item in promised) for step in build)
    assert flows["release"]["jobs"]["publish"]["needs"] == "wheels"


def test_every_script_that_a_workflow_runs_exists():
    for path in (ROOT / ".github" / "workflows").glob("*.yml"):
        for word in path.read_text().split():
            if word.startswith("scripts/"):
                assert (ROOT / word).exists(), word


READELF = """
 0x0000000000000001 (NEEDED)             Shared library: [libc.so.6]
 0x0000000000000001 (NEEDED)             Shared library: [{needed}]
 {path}
  000000: Rev: 1  Flags: none  Index: 2  Cnt: 1  Name: GLIBC_2.2.5
  0x0010: Name: GLIBC_{newest}  Flags: none  Version: 3
"""


@pytest.mark.parametrize(
    ("needed", "path", "newest", "wrong"),
    [
        ("libm.so.6", "", "2.28", None),
        ("libm.so.6", "", "2.29", "needs glibc 2.29"),
        ("libm.so.6", "", "2.34", "needs glibc 2.34"),
        ("libgomp.so.1", "", "2.17", "needs libgomp.so.1"),
        (
            "libm.so.6",
            "0x1d (RUNPATH) Library runpath: [/home/me/lib]",
            "2.17",
            "looks in /home/me",
        ),
    ],
)
def test_what_a_library_asks_for(tmp_path, monkeypatch, needed, path, newest, wrong):
    wheels = script("build_wheels")
    library = tmp_path / "_native.so"
    library.write_bytes(b"\x7fELF" + bytes(14) + (62).to_bytes(2, "little"))
    text = READELF.format(needed=needed, path=path, newest=newest)
    monkeypatch.setattr(wheels, "run", lambda *command: text)
    said = wheels.library_problems(library, "x86_64")
    assert len(said) == (wrong is not None)
    if wrong is not None:
        assert wrong in said[0]
    assert "ELF machine 62" in wheels.library_problems(library, "aarch64")[0]


def test_the_library_built_here_needs_no_newer_glibc():
    library, path = native.load()
    if library is None:
        pytest.skip(path)
    if shutil.which("readelf") is None:
        pytest.skip("readelf is not installed (Debian: binutils)")
    wheels = script("build_wheels")
    said = wheels.library_problems(Path(path), wheels.platform.machine())
    assert [line for line in said if "glibc" in line] == []


def test_every_package_is_listed():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {path.parent for path in (ROOT / "endor").rglob("*.py")}
    folders -= {ROOT / "endor" / "cli", ROOT / "endor" / "cuda"}
    assert all((folder / "__init__.py").is_file() for folder in folders)
    named = {".".join(("endor", *folder.relative_to(ROOT / "endor").parts)) for folder in folders}
    assert set(settings["packages"]) == named | {"endor.cli", "endor.cuda"}
