"""The rooms import one way only, and the public surface is what it says."""

import subprocess
import sys
from pathlib import Path

import pytest

import endor

ROOT = Path(endor.__file__).resolve().parent.parent


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
