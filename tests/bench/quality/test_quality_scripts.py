"""scripts/quality_methods.py and quality_table.py: what the table of quality compares, and how."""

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPTS = Path(__file__).parents[3] / "scripts"


def load(name):
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


methods, tables = load("quality_methods"), load("quality_table")


def error(row, weight, gram):
    """Return the relative output error and the bits of a row."""
    values, bits = methods.quantizer_of(row)("matrix", weight.clone(), gram.clone())
    assert values.shape == weight.shape
    change = values.float() - weight
    whole = float(((weight @ gram) * weight).sum())
    return float(((change @ gram) * change).sum()) / whole, bits


@pytest.fixture(scope="module")
def problem():
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(256, 256, generator=generator)
    inputs = torch.randn(1000, 256, generator=generator) @ mix
    inputs *= torch.exp(torch.randn(256, generator=generator))
    return torch.randn(128, 256, generator=generator) * 0.02, inputs.T @ inputs / 1000


@pytest.mark.parametrize(
    ("row", "bits"),
    [("ecq:4.25", 4.25), ("rtn:4", 4.0), ("gptq:4:64", 4.25), ("hqq:4:64", 4.5)],
)
def test_a_method_takes_its_bits_and_three_bits_are_worse(row, bits, problem):
    found, taken = error(row, *problem)
    assert taken == pytest.approx(bits, abs=0.03)
    fewer, _ = error(re.sub(r":4[.\d]*", ":3", row, count=1), *problem)
    assert 0 < found < fewer < 0.2


def test_feedback_makes_gptq_better_than_its_scales_alone(problem):
    weight, gram = problem
    values, _ = methods.gptq(4, 64)("matrix", weight, torch.diag(gram.diagonal()))
    change = values - weight
    apart = float(((change @ gram) * change).sum() / ((weight @ gram) * weight).sum())
    assert error("gptq:4:64", weight, gram)[0] < 0.8 * apart


@pytest.mark.parametrize("row", ["gguf:Q4_0", "llama:Q4_K"])
def test_formats_of_llama_cpp(row, problem):
    pytest.importorskip("gguf")
    if row.startswith("llama") and importlib.util.find_spec("llama_cpp") is None:
        pytest.skip("needs llama-cpp-python")
    found, bits = error(row, *problem)
    assert bits == 4.5
    assert 0 < found < 0.05


def test_a_row_that_does_not_exist_is_refused():
    with pytest.raises(SystemExit, match="unknown row 'awq:4'"):
        methods.quantizer_of("awq:4")


def record(row, bits, losses):
    dense = [3.0, 4.0, 5.0]
    more = [ours - theirs for ours, theirs in zip(losses, dense, strict=True)]
    text = {
        "perplexity": 50.0 + 10 * sum(more),
        "kl": 0.1,
        "kl_stderr": 0.01,
        "nats_more": sum(more) / 3,
        "nats_more_stderr": 0.01,
        "windows": 3,
        "window_nll": losses,
    }
    return {"row": row, "bits": bits, "novel": text}


def test_the_table_sorts_by_bits_and_pairs_say_who_is_better(tmp_path):
    rows = [
        record("dense", 16.0, [3.0, 4.0, 5.0]),
        record("gptq:4:64", 4.25, [3.2, 4.2, 5.2]),
        record("ecq:3.5", 3.5, [3.1, 4.1, 5.1]),
    ]
    rows[1]["novel"] |= {"windows": 2, "window_nll": [3.2, 4.2]}
    path = tmp_path / "out.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = [sys.executable, str(SCRIPTS / "quality_table.py"), str(path)]
    run = subprocess.run(
        [*command, "--pairs", "ecq:3.5,gptq:4:64"], capture_output=True, text=True, check=True
    )
    lines = run.stdout.splitlines()
    assert [line.split(" | ")[0] for line in lines[2:5]] == ["| 3.50", "| 4.25", "| 16.00"]
    assert "+8.4% to +12.7%" in lines[2]
    assert "0.1000 ± 0.0196" in lines[2]
    assert "56.00 (2 windows)" in lines[3]
    assert "-0.1000 nats a token (-0.1000 to -0.1000), lower in 2 of 2 windows" in lines[5]
    wrong = subprocess.run([*command, "--pairs", "ecq:3,dense"], capture_output=True, text=True)
    assert wrong.returncode == 2
    assert "--pairs ecq:3,dense: not measured" in wrong.stderr
