"""transformers learns the format whichever import comes first; without Endor loading fails."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import endor
from endor.errors import DependencyError
from endor.hf import register

ROOT = Path(endor.__file__).resolve().parent.parent

LOAD = """
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
print(type(model.model.layers[0].mlp.up_proj).__name__)
"""


def run(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{code}"
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize(
    "imports",
    [
        "import endor, transformers",
        "import transformers, endor",
        "import transformers.quantizers, endor",
        "import transformers.modeling_utils, endor",
        "import endor.hf.quantizer",
        "from endor import EndorConfig",
    ],
)
def test_any_import_order(pair, imports):
    done = run(imports + LOAD, str(pair.packed))
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["EndorLinear"]


def test_importing_endor_does_not_import_transformers():
    done = run(
        "import endor\n"
        "print([name for name in sys.modules if name.split('.')[0] in ('transformers', 'torch')])\n"
        "from endor.hf.register import _FINDER\n"
        "print(_FINDER in sys.meta_path)\n"
        "import transformers.quantizers\n"
        "from endor.hf.register import _FINDER\n"
        "print(_FINDER in sys.meta_path)\n"
        "print('endor' in transformers.quantizers.auto.AUTO_QUANTIZER_MAPPING)\n"
    )
    assert done.stdout.split() == ["[]", "True", "False", "True"], done.stderr


def test_installing_twice_is_no_harm():
    done = run(
        "import endor, transformers.quantizers.auto as table\n"
        "from endor.hf.register import install\n"
        "install(); install()\n"
        "ours = [t for t in table.LOADING_ATTRIBUTES_CONFIG_TYPES if t.__name__ == 'EndorConfig']\n"
        "print(len(ours))\n"
    )
    assert done.stdout.split() == ["1"], done.stderr


def test_without_endor_loading_fails_loudly(pair):
    done = run(LOAD, str(pair.packed))
    assert done.returncode != 0
    assert "OSError" in done.stderr
    assert "model.safetensors" in done.stderr


def test_a_table_that_does_not_take_the_quantizer(monkeypatch):
    table = SimpleNamespace(
        AUTO_QUANTIZER_MAPPING={},
        LOADING_ATTRIBUTES_CONFIG_TYPES=(),
        register_quantization_config=lambda method: lambda kind: kind,
        register_quantizer=lambda method: lambda kind: kind,
    )
    with pytest.raises(DependencyError, match="did not take the quantizer 'endor'"):
        register.register(table)
    del table.LOADING_ATTRIBUTES_CONFIG_TYPES
    with pytest.raises(DependencyError, match="has no LOADING_ATTRIBUTES_CONFIG_TYPES"):
        register.register(table)
