"""What is taken for granted in other libraries is listed, guarded, and tested."""

import re
from pathlib import Path

import pytest

import endor
from endor.dependencies import changed, installed, internals, require
from endor.errors import DependencyError
from endor.hf import quantizer

ROOT = Path(endor.__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "dependencies.md"


def test_the_listed_tests_exist():
    listed = re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", PAGE.read_text())
    assert len(listed) > 12
    for path, name in listed:
        text = (ROOT / path).read_text()
        assert not name or f"def {name}(" in text, (path, name)


def test_every_module_that_reaches_in_is_listed():
    page = PAGE.read_text()
    for path in (ROOT / "endor").rglob("*.py"):
        if path.name != "dependencies.py" and "endor.dependencies import" in path.read_text():
            assert f"{path.parent.name}/{path.name}" in page, path


def test_names_that_are_gone():
    with pytest.raises(DependencyError, match=r"safetensors [0-9.]+: it has no module safetens"):
        internals("safetensors.nowhere", "x")
    with pytest.raises(DependencyError, match=r"safetensors [0-9.]+: .* has no nothing"):
        internals("safetensors.torch", "save_file", "nothing")
    (found,) = internals("safetensors.torch", "save_file")
    assert found.__name__ == "save_file"
    with pytest.raises(ModuleNotFoundError):  # not installed: for whoever asked to say so
        internals("no_such_library.part", "x")


def test_the_methods_that_are_overridden():
    assert set(quantizer._CALLED) <= set(vars(quantizer.EndorQuantizer))
    require("transformers", quantizer.HfQuantizer, quantizer._CALLED)
    with pytest.raises(DependencyError, match=r"HfQuantizer has no no_such"):
        require("transformers", quantizer.HfQuantizer, ["no_such"])


def test_versions():
    assert re.match(r"\d+\.", installed("numpy"))
    assert installed("no-such-library") == "unknown"
    assert "docs/dependencies.md" in str(changed("numpy", "it is gone"))
