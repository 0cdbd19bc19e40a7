"""The slow path is loud: a library that is missing, broken, old or hidden."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import endor
from endor.kernels import native

from ..conftest import need

PACKAGE = Path(endor.__file__).parent

USE = """
import numpy as np
from endor import kernels
from endor.codecs import DTYPES
bits = np.ones(3000, dtype=np.uint16)
for _ in range(3):
    kernels.decode(kernels.encode(bits, DTYPES["BF16"]), np.empty_like(bits))
print(kernels.describe()["kernel"])
"""


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of the source tree without the compiled library."""
    root = tmp_path / "tree"
    ignored = shutil.ignore_patterns("_native*.so", "__pycache__", "csrc", "data")
    shutil.copytree(PACKAGE, root / "endor", ignore=ignored)
    (root / "setup.py").touch()
    return root


def run(code: str, *path: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {key: value for key, value in os.environ.items() if key != "ENDOR_KERNEL"}
    joined = os.pathsep.join(map(str, path))
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=path[0],
        env={**kept, "PYTHONPATH": joined, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done


def installed(root: Path) -> Path:
    """Put the compiled package under `root`, as an installation would."""
    need("scalar")
    _, library = native.load()
    kernels = root / "endor" / "kernels"
    kernels.mkdir(parents=True)
    shutil.copy(library, kernels)
    return root


def test_a_missing_library_is_told_once(tree: Path) -> None:
    done = run(USE, tree)
    assert done.stdout.strip() == "numpy"
    assert done.stderr.count("SlowWarning") == 1
    message = done.stderr.split("SlowWarning: ")[1]
    assert f"no compiled library in {tree / 'endor' / 'kernels'}" in message
    assert f"pip install -e {tree}" in message
    assert "times slower" in message


def test_numpy_on_request_is_silent(tree: Path) -> None:
    assert not run(USE, tree, ENDOR_KERNEL="numpy").stderr


def test_a_source_tree_that_hides_an_installed_package(tree: Path, tmp_path: Path) -> None:
    site = installed(tmp_path / "site")
    message = run(USE, tree, site).stderr
    assert f"Python runs from {tree}, which hides the compiled package in {site}" in message


@pytest.mark.parametrize("kind", ["damaged", "foreign"])
def test_a_library_that_does_not_load(tree: Path, tmp_path: Path, kind: str) -> None:
    broken = tree / "endor" / "kernels" / "_native.so"
    if kind == "damaged":
        broken.write_bytes(b"\x7fELF")
    else:  # a library that loads, without our functions: as one built from older sources
        compiler = shutil.which("cc")
        if compiler is None:
            pytest.skip("no C compiler")
        subprocess.run([compiler, "-shared", "-o", broken, "-x", "c", "/dev/null"], check=True)
    message = run(USE, tree).stderr
    assert message.count("SlowWarning") == 1
    assert str(broken) in message
    assert ("does not load" if kind == "damaged" else "was built from other sources") in message


def test_one_that_loads_is_taken_among_those_that_do_not(tree: Path) -> None:
    need("scalar")
    _, library = native.load()
    (tree / "endor" / "kernels" / "_native.a.so").write_bytes(b"no library")
    shutil.copy(library, tree / "endor" / "kernels" / "_native.b.so")
    done = run(USE, tree)
    assert done.stdout.strip() != "numpy"
    assert not done.stderr


def test_info_tells_too(tree: Path) -> None:
    code = (
        "import sys; sys.argv = ['endor', 'info', '--json']; import endor.cli.main as m; m.main()"
    )
    done = run(code, tree)
    told = json.loads(done.stdout)["CPU kernels"]
    assert told["library"] is None
    assert told["kernel"] == "numpy"
    assert "no compiled library" in told["reason"]
    assert "slower" in told["slow"]
    assert not done.stderr  # telling is enough


def test_the_command_line_warns_on_one_line(tree: Path) -> None:
    code = "import endor.cli.main as m, warnings; m.cli.main = lambda **_: exec(USE); m.main()"
    done = run(f"USE = {USE!r}\n{code}", tree)
    lines = done.stderr.splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("endor: warning: the compiled CPU kernels are not in use")
