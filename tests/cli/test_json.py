"""What `--json` prints is what docs/json.md says; what is logged, and when."""

import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

import endor
from endor.cli.main import cli
from endor.cli.terminal import SCHEMA_VERSION
from endor.planning import machine as hardware

from ..support.tiny_talker import pack_talker

PAGE = Path(endor.__file__).resolve().parent.parent / "docs" / "json.md"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("json")
    pack_talker(folder)
    (folder / "text.txt").write_text("w1 w2 w3 w4 w5 w6 w7 w8 " * 40)
    return folder


@pytest.fixture(autouse=True)
def _quick(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(hardware, "measure", hardware.typical)
    monkeypatch.setattr(hardware, "disk", lambda path, **options: hardware.TYPICAL_DISK)


def documented() -> dict[str, set[str]]:
    rows = [line.split(" | ") for line in PAGE.read_text().splitlines() if line.startswith("| `")]
    return {
        row[0].strip("| `"): set(row[1].strip(" |").replace("`", "").split(", ")) for row in rows
    }


COMMANDS = {
    "pack": ("pack", "{root}/source", "{out}"),
    "prune": ("prune", "{root}/source", "{out}", "--method", "magnitude"),
    "quantize": ("quantize", "{root}/source", "{out}", "--bits", "4", "--calibration", "none"),
    "unpack": ("unpack", "{root}/packed", "{out}"),
    "inspect": ("inspect", "{root}/packed"),
    "verify": ("verify", "{root}/packed"),
    "generate": ("generate", "{root}/packed", "--prompt", "w1", "--max-new-tokens", "2"),
    "eval": ("eval", "{root}/packed", "--text", "{root}/text.txt", "--window", "32"),
    "plan": ("plan", "{root}/packed"),
    "info": ("info",),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_the_keys_are_those_of_the_page(command, root, tmp_path):
    words = [word.format(root=root, out=tmp_path / "out") for word in COMMANDS[command]]
    done = CliRunner().invoke(cli, ["--quiet", *words, "--json"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found.pop("schema_version") == SCHEMA_VERSION
    assert set(found) == documented()[command]


def test_the_page_says_the_version():
    assert f"`schema_version` is {SCHEMA_VERSION}." in PAGE.read_text()
    assert set(documented()) == set(COMMANDS)


@pytest.mark.parametrize(
    ("options", "said", "unsaid"),
    [
        ((), (), ("expected", "units")),
        (("-v",), ("tokens/s expected", "units"), ()),
        (("--quiet",), (), ("expected",)),
    ],
)
def test_what_is_decided_is_said_where_asked(root, options, said, unsaid):
    words = [*options, "generate", str(root / "packed"), "--prompt", "w1", "--max-new-tokens", "1"]
    done = CliRunner().invoke(cli, words, catch_exceptions=False)
    assert done.exit_code == 0
    for text in said:
        assert text in done.stderr
    for text in unsaid:
        assert text not in done.stderr.replace("was predicted", "")
    logging.getLogger("endor").setLevel(logging.NOTSET)


def test_quiet_and_verbose_contradict():
    done = CliRunner().invoke(cli, ["-v", "-q", "info"])
    assert done.exit_code == 2


def test_quiet_shows_no_progress(monkeypatch, capsys):
    from endor.cli import progress, terminal

    monkeypatch.setattr(terminal, "_quiet", True)
    with (
        progress.progress_bar("work", after_s=0) as move,
        progress.calibration_progress() as layers,
    ):
        move(1, 2)
        layers(1, 2, "wanda")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts(shell):
    done = subprocess.run(
        [sys.executable, "-c", "from endor.cli.main import main; main()"],
        env={"_ENDOR_COMPLETE": f"{shell}_source", "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "_ENDOR_COMPLETE" in done.stdout, done.stderr
