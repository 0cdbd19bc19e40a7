"""Streams that are closed, names that would talk to the terminal, and what must stay light."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import endor
from endor.cli.terminal import printable

EVIL = "model.\x1b]0;owned\x07.\u202egnp.exe\x9b31m.weight"
PYTHON = sys.executable


def write_model(folder: Path, **extra: torch.Tensor) -> Path:
    folder.mkdir()
    name = "model.layers.0.mlp.up_proj.weight"
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    save_file({name: weight, **extra}, folder / "model.safetensors")
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return folder


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_model(tmp_path / "model")


def shell(text: str, **places: Path) -> subprocess.CompletedProcess[str]:
    """Run a line of bash in which `endor` is this interpreter's."""
    quoted = {key: f"'{value}'" for key, value in places.items()}
    line = f"endor() {{ '{PYTHON}' -m endor \"$@\"; }}; {text.format(**quoted)}"
    return subprocess.run(
        ["bash", "-c", line], check=False, capture_output=True, text=True, timeout=120
    )


def test_printable():
    assert printable("plain é 漢") == "plain é 漢"
    assert printable("a\x1b[1m\u202e\u2066\ud800\n") == r"a\x1b[1m\u202e\u2066\ud800\n"
    assert printable("a\n", keep="\n") == "a\n"


def test_names_never_reach_the_terminal(tmp_path):
    folder = write_model(tmp_path / "m", **{EVIL: torch.ones(2)})
    packed = tmp_path / "p"
    endor.pack_checkpoint(folder, packed)
    (folder / "model.safetensors").unlink()
    save_file({EVIL: torch.zeros(3)}, folder / "model.safetensors")
    for command in ("inspect {p}", "inspect {p} --json", "verify {p} --against {m}"):
        done = shell(f"endor {command}", p=packed, m=folder)
        text = done.stdout + done.stderr
        assert "owned" in text
        assert all(one.isprintable() or one == "\n" for one in text), command
    done = shell("endor pack {p} {o} --include 'zz\x1b[5m'", p=packed, o=tmp_path / "\x1b[5mo")
    assert "\x1b" not in done.stderr


@pytest.mark.parametrize("closing", ["2>&-", ">&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_closed_streams(model, tmp_path, closing):
    done = shell(f"endor pack {{m}} {{o}} {closing}", m=model, o=tmp_path / "o")
    assert done.returncode == 0, done.stderr
    assert endor.verify_checkpoint(tmp_path / "o").ok


@pytest.mark.parametrize("what", ["inspect {p}", "inspect {p} --json", "--help", "pack --help"])
def test_a_reader_that_is_gone(model, tmp_path, what):
    endor.pack_checkpoint(model, tmp_path / "p")
    script = (
        "import os, subprocess, sys\n"
        "read, write = os.pipe(); os.close(read)\n"
        "done = subprocess.run([sys.executable, '-m', 'endor', *sys.argv[1:]], stdout=write,\n"
        "    stderr=subprocess.PIPE)\n"
        "sys.stderr.buffer.write(done.stderr); sys.exit(done.returncode)"
    )
    words = what.format(p=tmp_path / "p").split()
    done = subprocess.run(
        [PYTHON, "-c", script, *words], check=False, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_damage_is_not_hidden_by_a_reader_that_is_gone(model, tmp_path):
    endor.pack_checkpoint(model, tmp_path / "p")
    shard = next((tmp_path / "p").glob("endor-*"))
    raw = bytearray(shard.read_bytes())
    raw[-200] ^= 1
    shard.write_bytes(raw)
    done = shell("set -o pipefail; endor verify {p} 2>&1 | true", p=tmp_path / "p")
    assert done.returncode == 1


def test_a_full_disk_behind_the_output(model, tmp_path):
    endor.pack_checkpoint(model, tmp_path / "p")
    done = shell("endor inspect {p} > /dev/full", p=tmp_path / "p")
    assert done.returncode == 1
    assert "No space left" in done.stderr
    assert done.stderr.count("\n") == 1


def test_no_bars_without_a_terminal(model, tmp_path):
    done = shell("endor pack {m} {o} --prune magnitude", m=model, o=tmp_path / "o")
    assert done.returncode == 0
    assert done.stderr == ""


def test_growth_is_said_as_growth(tmp_path):
    folder = write_model(tmp_path / "m")
    done = shell("endor pack {m} {o} && endor inspect {o}", m=folder, o=tmp_path / "o")
    assert done.stdout.count("x larger") == 2
    assert "smaller" not in done.stdout


LIGHT = ("torch", "transformers", "cupy")


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["--version"], 0),
        (["--help"], 0),
        (["pack", "--help"], 0),
        (["generate", "--help"], 0),
        (["inspect", "{p}"], 0),
        (["verify", "{p}"], 0),
        (["verify", "{p}", "--against", "{m}"], 0),
        (["pack", "{m}", "{p}"], 1),
        (["pack", "{m}", "{new}"], 0),
        (["unpack", "{p}", "{new}"], 0),
        (["unpack", "{p}", "{m}"], 1),
    ],
)
def test_what_needs_no_torch_does_not_import_it(model, tmp_path, words, code):
    endor.pack_checkpoint(model, tmp_path / "p")
    script = (
        "import atexit, sys\n"
        f"heavy = lambda: [m for m in {LIGHT} if m in sys.modules]\n"
        "atexit.register(lambda: print(heavy(), file=sys.stderr))\n"
        "from endor.cli.main import main\nmain()"
    )
    places = {"p": tmp_path / "p", "m": model, "new": tmp_path / "new"}
    words = [word.format(**places) for word in words]
    done = subprocess.run(
        [PYTHON, "-c", script, *words], check=False, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == code, done.stderr
    assert done.stderr.splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("pack {m} {o} --sparsity 0.5", "--sparsity does nothing without --prune"),
        ("pack {m} {o} --pattern 2:4", "--pattern does nothing without --prune"),
        ("pack {m} {o} --calibration wiki", "--calibration does nothing without --prune"),
        ("pack {m} {o} --prune magnitude --sparsity 50", "for 50 % give 0.5"),
        ("prune {m} {o} --sparsity 70%", "for 70 % give 0.7"),
        ("prune {m} {o} --sparsity -1", "not in the range"),
        ("generate {o} --prompt $'caf\\xe9'", "must be UTF-8; byte 0xe9"),
    ],
)
def test_wrong_usage(model, tmp_path, words, message):
    done = shell(f"endor {words}", m=model, o=tmp_path / "o")
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "o").exists()


def test_a_file_becomes_a_file(model, tmp_path):
    lone, out = tmp_path / "x.safetensors", tmp_path / "o.safetensors"
    (model / "model.safetensors").rename(lone)
    done = shell("endor pack {x} {o} --json && endor inspect {o}", x=lone, o=out)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[0])["tensors"] == 1
    assert out.is_file()
    found, wanted = endor.load_file(out), endor.load_file(lone)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    again = shell("endor pack {x} {o}", x=lone, o=out)
    assert (again.returncode, again.stderr.count("\n")) == (1, 1)
    assert "exists already" in again.stderr
    over = shell("endor pack {x} {o} --overwrite", x=lone, o=out)
    assert over.returncode == 0, over.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "model",
        "o.safetensors",
        "x.safetensors",
    ]
    same = shell("endor pack {x} {x} --overwrite", x=lone)
    assert "is the input" in same.stderr


def test_root_is_no_place(model):
    for command in ("pack", "prune"):
        done = shell(f"endor {command} {{m}} / --overwrite", m=model)
        assert (done.returncode, done.stderr.count("\n")) == (1, 1)


@pytest.mark.parametrize("limit", ["-v 400000", "-u 1"])
def test_no_memory_and_no_threads_are_one_line(model, tmp_path, limit):
    line = f"ulimit {limit}; exec '{PYTHON}' -m endor pack {{m}} {{o}}"
    done = shell(line, m=model, o=tmp_path / "o")
    assert "Traceback" not in done.stderr
