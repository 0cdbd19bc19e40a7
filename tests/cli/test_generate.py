"""`endor generate` prints the model's text on stdout and its cost on stderr."""

import json
import re

import pytest
from click.testing import CliRunner

import endor
from endor.cli.generate import generate_command, peak_memory_bytes, summary
from endor.errors import BudgetError, CheckpointError, ConfigError
from endor.planning import machine as hardware

from ..support.tiny_talker import pack_talker


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """A packed checkpoint with a tokenizer of the words w0 to w99, and its dense twin."""
    root = tmp_path_factory.mktemp("generate")
    pack_talker(root)
    endor.unpack_checkpoint(root / "packed", root / "dense")
    return root


@pytest.fixture(autouse=True)
def _quick(monkeypatch, tmp_path):
    """Keep the user's cache out of it, and measure nothing."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(hardware, "measure", hardware.typical)
    monkeypatch.setattr(hardware, "disk", lambda path, **options: hardware.TYPICAL_DISK)


def run(folder, *arguments):
    command = [str(folder), "--prompt", "w3 w4", "--max-new-tokens", "6", *arguments]
    return CliRunner().invoke(generate_command, command, catch_exceptions=True)


def test_text_and_cost_go_separate_ways(checkpoints):
    packed, dense = run(checkpoints / "packed"), run(checkpoints / "dense")
    assert packed.exit_code == 0, packed.output
    assert packed.stdout == dense.stdout
    assert 4 <= len(packed.stdout.split()) <= 6  # w0 is a special token and not shown
    for word in ("prefill", "decode", "moved", "memory"):
        assert word in packed.stderr
    assert "moved" not in dense.stderr


def test_json_has_every_figure(checkpoints):
    done = run(checkpoints / "packed", "--json", "--fast")
    found = json.loads(done.stdout)
    assert found["text"]
    assert found["new_tokens"] == 6
    assert found["exact"] is False
    assert found["packed_bytes_per_token"] > 0
    assert found["disk_bytes"] == 0
    assert found["peak_memory_bytes"] > 1 << 20
    assert found["engine"]["counters"]["products"] > 0


def test_a_small_budget_streams(checkpoints):
    whole = json.loads(run(checkpoints / "packed", "--json").stdout)
    refusal = run(checkpoints / "packed", "--ram", "1kB").exception
    assert isinstance(refusal, BudgetError)
    least = re.search(r"\((\d+) bytes\)", str(refusal))
    assert least is not None
    found = json.loads(run(checkpoints / "packed", "--json", "--ram", least[1]).stdout)
    assert found["text"] == whole["text"]
    assert found["disk_bytes"] > 0
    assert found["bound"] in ("cpu", "disk")


def test_sampling_and_chat(checkpoints):
    arguments = ["--temperature", "1.2", "--top-p", "0.9", "--seed", "5", "--chat"]
    first = run(checkpoints / "packed", *arguments)
    assert first.exit_code == 0, first.output
    assert first.stdout == run(checkpoints / "packed", *arguments).stdout
    assert first.stdout != run(checkpoints / "packed").stdout


def test_report(checkpoints, tmp_path):
    page = tmp_path / "report.html"
    assert run(checkpoints / "packed", "--report", str(page)).exit_code == 0
    assert page.read_text().lstrip().lower().startswith("<!doctype html")
    assert run(checkpoints / "dense", "--report", str(page)).exit_code == 2


def test_usage_errors(checkpoints):
    assert isinstance(run(checkpoints / "dense", "--ram", "1GB").exception, ConfigError)
    assert isinstance(run(checkpoints / "packed", "--temperature", "-1").exception, ConfigError)
    nowhere = run(checkpoints / "nowhere").exception
    assert isinstance(nowhere, CheckpointError)
    assert "no such checkpoint" in str(nowhere)


def test_lossy_experts_are_for_mixtures(checkpoints):
    for folder in ("packed", "dense"):
        assert isinstance(run(checkpoints / folder, "--experts", "lossy").exception, ConfigError)


def test_lossy_experts_are_said(checkpoints):
    facts = json.loads(run(checkpoints / "packed", "--json").stdout)
    assert (facts["experts"], facts["replaced"], facts["exact"]) == ("exact", 0.0, True)
    assert "lossy" not in summary(facts)
    text = summary(facts | {"experts": "lossy", "replaced": 0.125})
    assert "lossy: 12.5% of the choices were replaced; the text is not the model's own" in text


def test_peak_memory_is_this_process():
    assert 1 << 24 < peak_memory_bytes() < 1 << 40


def test_what_is_packed_in_vain_is_named(checkpoints, tmp_path, monkeypatch):
    """By pack when that costs nothing beside the packing, by inspect when asked, and at load."""
    from endor.cli import pack
    from endor.cli.main import cli

    monkeypatch.setattr(pack, "ASKED_BYTES", 0)
    runner, out = CliRunner(), tmp_path / "out"
    words = [
        "pack",
        str(checkpoints / "source"),
        str(out),
        "--include",
        "model.embed_tokens.weight",
    ]
    packed = runner.invoke(cli, words)
    assert packed.exit_code == 0, packed.output
    line = "packed but expanded at load: model.embed_tokens.weight, 12.80 kB"
    assert line in packed.stderr
    assert line in runner.invoke(cli, ["inspect", str(out), "--model"]).stderr
    found = json.loads(runner.invoke(cli, ["inspect", str(out), "--model", "--json"]).stdout)
    assert found["expanded_at_load"] == ["model.embed_tokens.weight"]
    assert line in run(out).stderr
    plain = runner.invoke(cli, ["inspect", str(checkpoints / "packed"), "--model"])
    assert "expanded" not in plain.stderr
    found = json.loads(
        runner.invoke(cli, ["inspect", str(checkpoints / "packed"), "--model", "--json"]).stdout
    )
    assert found["expanded_at_load"] == []
