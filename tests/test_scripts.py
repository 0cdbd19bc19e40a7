"""The scripts that make models and pages: each page of benchmarks can be made by one command."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ROOT / "scripts"
PAGES = sorted(path.stem for path in (ROOT / "docs" / "benchmarks").glob("*.md"))


def run(*words):
    command = [sys.executable, *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("page", PAGES)
def test_a_page_is_made_by_scripts_that_take_these_options(page, tmp_path):
    lines = run(SCRIPTS / "reproduce.py", page, tmp_path / "work", "--dry-run").splitlines()
    ours = [words for line in lines for words in [shlex.split(line)] if "-m" not in words[:2]]
    assert ours
    for words in ours:
        at = next(at for at, word in enumerate(words) if word.startswith("scripts/"))
        script = ROOT / words[at]
        files = [*script.glob("*.py")] if script.is_dir() else [script]
        text = "".join(file.read_text(encoding="utf-8") for file in files)
        flags = [word for word in words[at + 1 :] if re.fullmatch("--[a-z-]+", word)]
        assert [flag for flag in flags if f'"{flag}"' not in text] == []
    assert not (tmp_path / "work").exists()


@pytest.mark.parametrize("page", PAGES)
def test_what_a_page_names_is_there(page):
    text = (ROOT / "docs" / "benchmarks" / f"{page}.md").read_text(encoding="utf-8")
    told = set(re.findall(r"scripts/[a-z_0-9]+(?:\.py|\.sh)?", text))
    assert [name for name in sorted(told) if not (ROOT / name).exists()] == []


def test_a_random_model_is_the_same_every_time(tmp_path):
    size = [
        "--layers",
        "1",
        "--hidden",
        "32",
        "--intermediate",
        "48",
        "--heads",
        "2",
        "--vocab",
        "300",
    ]
    for name in "ab":
        run(SCRIPTS / "make_model", "random", tmp_path / name, *size)
    files = sorted(path.name for path in (tmp_path / "a").glob("*.safetensors"))
    assert len(files) == 3
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    layer = load_file(tmp_path / "a" / files[1])
    assert layer["model.layers.0.mlp.up_proj.weight"].shape == (48, 32)


def test_the_bench_of_chosen_rows_at_toy_size():
    size = ["--rows", "64", "--cols", "128", "--turns", "1"]
    lines = run(SCRIPTS / "chosen_rows_bench.py", *size).splitlines()
    assert [line.count(" ms") for line in lines] == [1, 1]
    assert all("all " in line and "80% " in line for line in lines)


def test_neurons_are_busy_by_the_law_that_was_asked_for(tmp_path):
    """So many of them make 80 % of the activations, by their biases, and so many are zero."""
    sizes = ("--hidden", 64, "--intermediate", 4000, "--layers", 1, "--heads", 4)
    run(SCRIPTS / "make_model", "relu", tmp_path / "m", *sizes, "--zeros", 0.93, "--busy", 0.26)
    (bias,) = (
        tensor.double()
        for file in (tmp_path / "m").glob("*.safetensors")
        for name, tensor in load_file(file).items()
        if name.endswith("fc1.bias")
    )
    shares = torch.special.ndtr(bias / (0.02 * 64**0.5)).sort(descending=True).values
    assert abs(float(shares.mean()) - 0.07) < 0.002
    assert abs(float(shares[:1040].sum() / shares.sum()) - 0.8) < 0.01
