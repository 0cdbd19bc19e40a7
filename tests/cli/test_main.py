"""The command line as a whole: help, exit codes, one-line errors."""

import json
import subprocess
import sys

import click
import pytest
from click.testing import CliRunner

from endor import __version__
from endor.cli.main import COMMANDS, cli


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "endor.cli.main", *arguments]
    return subprocess.run(command, check=False, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(name):
    result = CliRunner().invoke(cli, [name, "--help"])
    assert result.exit_code == 0, result.output
    command = cli.get_command(click.Context(cli), name)
    assert command is not None
    assert command.help
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            assert parameter.help, f"{name} {parameter.opts} has no help"


def test_help_is_light():
    script = (
        "import sys\nfrom click.testing import CliRunner\nfrom endor.cli.main import cli\n"
        "assert CliRunner().invoke(cli, ['--help']).exit_code == 0\n"
        "print([m for m in ('torch', 'transformers', 'cupy') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    assert out.stdout.strip() == "[]"


def test_version():
    assert CliRunner().invoke(cli, ["--version"]).output.strip() == f"endor, version {__version__}"


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["pack"], 2),
        (["nothing"], 2),
        (["inspect", "/does/not/exist"], 1),
        (["verify", "/does/not/exist"], 1),
    ],
)
def test_exit_codes(arguments, code):
    result = run(*arguments)
    assert result.returncode == code
    assert "Traceback" not in result.stderr
    assert result.stderr
    if code == 1:
        assert result.stderr.startswith("endor: ")
        assert result.stderr.count("\n") == 1


def test_debug_shows_the_trace():
    result = run("--debug", "inspect", "/does/not/exist")
    assert result.returncode == 1
    assert "Traceback" in result.stderr


def test_info_says_what_will_run():
    result = CliRunner().invoke(cli, ["info", "--json"])
    assert result.exit_code == 0, result.output
    facts = json.loads(result.output)
    assert facts["versions"]["endor"] == __version__
    assert facts["CPU kernels"]
    assert facts["GPU kernels"]
