"""The rooms import one way only, and the public surface is what it says."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import endor

ROOT = Path(endor.__file__).resolve().parent.parent
ROOMS = [
    "version",
    "errors",
    "namesake",
    "dependencies",
    "sizes",
    "foreign",
    "jsontext",
    "threads",
    "hub",
    "codecs",
    "dtypes",
    "kernels",
    "machine",
    "trust",
    "packed",
    "storage",
    "formats",
    "checkpoint",
    "sharing",
]
ROOMS += [
    "planning",
    "models",
    "pruning",
    "quantization",
    "packing",
    "offload",
    "hf",
    "serving",
    "bench",
    "cli",
]


def imported_rooms(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        found |= {name.split(".")[1] for name in names if name.startswith("endor.")}
    return found & set(ROOMS)


def sources() -> list[Path]:
    return [path for path in (ROOT / "endor").rglob("*.py")] + list((ROOT / "cli").rglob("*.py"))


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_one_way(path):
    parts = path.relative_to(ROOT).parts
    room = "cli" if parts[0] == "cli" else parts[1].removesuffix(".py")
    if room not in ROOMS:
        return
    allowed = set(ROOMS[: ROOMS.index(room) + 1])
    assert imported_rooms(path) <= allowed


def test_importing_endor_is_light():
    heavy = ("torch", "cupy", "transformers", "matplotlib", "kvikio", "cuda")
    script = f"import sys, endor; print([m for m in {heavy} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    assert out.stdout.strip() == "[]"


def test_the_public_surface_is_complete():
    assert endor.__all__ == sorted(endor.__all__)
    for name in endor.__all__:
        assert getattr(endor, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = endor.nothing


def test_cuda_is_never_a_regular_package():
    """A regular top-level `cuda` package would shadow NVIDIA's namespace and break cupy."""
    assert (ROOT / "cuda").is_dir()
    assert not (ROOT / "cuda" / "__init__.py").exists()


def test_links_are_relative():
    for name in ("cli", "cuda"):
        link = ROOT / "endor" / name
        assert link.is_symlink()
        assert str(link.readlink()) == f"../{name}"
