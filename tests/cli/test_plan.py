"""`endor plan` prints a placement, its arithmetic and its picture."""

import json
from types import SimpleNamespace

import pytest
import torch
import transformers
from click.testing import CliRunner

import endor
from endor.cli.plan import plan_command
from endor.cli.plan_text import ways
from endor.errors import BudgetError, ConfigError
from endor.planning import machine as hardware
from endor.planning import probes
from endor.planning.products import Products


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    root = tmp_path_factory.mktemp("plan")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
    )
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(root / "source")
    endor.pack_checkpoint(root / "source", root / "packed", prune="magnitude")
    return root / "packed"


@pytest.fixture(autouse=True)
def _quick(monkeypatch, tmp_path):
    """Keep the user's cache out of it, and the probes small."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    constants = {
        **probes.memory(1, 1 << 20),
        **probes.codecs("BF16", 1, rows=16, cols=1024),
        **probes.linear("BF16", rows=16, cols=64, batch=4),
    }
    found = hardware.Machine(dtype="BF16", threads=1, **constants)
    monkeypatch.setattr(hardware, "measure", lambda dtype: found)


def run(packed, *arguments):
    ran = CliRunner().invoke(plan_command, [str(packed), *arguments], catch_exceptions=False)
    assert ran.exit_code == 0, ran.output
    return ran.stdout


def test_a_plan_says_what_goes_where_and_how_fast(packed):
    out = run(packed, "--ram", "100MB")
    assert out.startswith("LlamaForCausalLM: 28 units, ")
    for line in ("prefill  ", "decode   ", "dense    ", "cache of keys and values"):
        assert line in out


def test_explain_prints_the_arithmetic(packed):
    out = run(packed, "--ram", "100MB", "--explain")
    assert "expand exp+bitmap, dense bytes" in out
    assert "decode: cpu = expand" in out
    assert "unhidden" in out


def test_explain_says_which_way_units_are_multiplied(packed):
    exact = run(packed, "--ram", "100MB", "--explain")
    assert "measured: " in exact
    assert "multiplied" not in exact
    plan = SimpleNamespace(
        tiers={"a": "resident", "b": "dense", "c": "disk", "d": "disk", "e": "disk"},
        products=Products({"a": 8, "b": 8, "c": 3, "d": 1, "e": 0}, 4),
    )
    assert ways(plan) == [
        "1 units: 1 to 8 rows multiplied from the packed form",
        "1 units: 1 to 3 rows multiplied from the packed form, expanded from there on",
        "1 units: 1 row multiplied from the packed form, expanded from there on",
        "1 units: expanded and multiplied, which is faster here",
        "expanded units are multiplied in float32 from 4 rows on",
    ]


def test_json_holds_the_tier_of_every_unit(packed, tmp_path):
    plot = tmp_path / "plan.png"
    found = json.loads(run(packed, "--ram", "2MB", "--json", "--fast", "--plot", str(plot)))
    assert len(found["tiers"]) == found["units"] == 28
    assert found["workload"]["product"] == "direct"
    assert found["decode"]["tokens_per_s"] > 0
    assert plot.read_bytes()[:4] == b"\x89PNG"


def test_too_little_memory_is_refused_with_the_least(packed):
    with pytest.raises(BudgetError, match="must be at least"):
        run(packed, "--ram", "1KiB")


def test_keys_and_values_on_disk_leave_memory_to_weights(packed):
    def cache(*arguments):
        found = json.loads(run(packed, "--ram", "100MB", "--context", "4096", "--json", *arguments))
        return sum(item["nbytes"] for item in found["reservations"] if "keys" in item["what"])

    assert 0 < cache("--kv", "disk") < cache("--kv", "device") == cache()


def test_a_model_is_planned_before_it_is_packed(packed):
    source = packed.parent / "source"
    out = run(source, "--for", "rtx4090")
    assert "on RTX 4090, predicted" in out
    for way in ("lossless", "50% pruned", "3.5 bits"):
        assert way in out
    one = run(source / "config.json", "--for", "rtx3060-12g", "--bits", "3.5")
    assert "3.5 bits: 28 units" in one
    assert "nothing was measured" in one
    found = json.loads(run(source, "--for", "h100", "--sparsity", "0.7", "--json"))
    assert [way["packed"] for way in found["ways"]] == ["70% pruned"]
    assert found["ways"][0]["decode"]["tokens_per_s"] > 0


def test_machines_are_listed():
    out = CliRunner().invoke(plan_command, ["--for", "list"], catch_exceptions=False).stdout
    assert "rtx4060-laptop" in out
    assert "white paper" in out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--bits", "3"], "not packed"),
        (["--disk", "3"], "--for"),
    ],
)
def test_options_that_do_not_apply_are_refused(packed, arguments, said):
    ran = CliRunner().invoke(plan_command, [str(packed), *arguments])
    assert ran.exit_code == 2
    assert said in ran.stderr


def test_a_model_is_asked_for():
    ran = CliRunner().invoke(plan_command, ["--for", "rtx4090"])
    assert ran.exit_code == 2
    assert "MODEL" in ran.stderr


def test_a_plan_with_the_host_names_the_ways_and_their_terms(tmp_path):
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 4096,
        "intermediate_size": 16384,
        "num_hidden_layers": 80,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 1000,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    words = ["--for", "rtx4060-laptop", "--sparsity", "0.5"]
    fast = run(tmp_path, *words, "--fast", "--explain")
    for line in (
        "RAM, multiplied there",
        "best ways, this plan's first",
        "weights in RAM cross the link",
        "some weights are multiplied in RAM",
        "rows of each weight in RAM",
        "host products",
        "the host multiplies",
        "GB multiplied",
    ):
        assert line in fast
    for others in (["--exact"], ["--fast", "--host-compute", "off"]):
        assert "multiplied there" not in run(tmp_path, *words, *others, "--explain")
    found = json.loads(run(tmp_path, *words, "--fast", "--json"))["ways"][0]
    assert found["decode"]["host_bytes"] > 0
    for wrong in (["--host-compute", "on"], ["--experts", "lossy"]):
        done = CliRunner().invoke(plan_command, [str(tmp_path), *words, *wrong])
        assert isinstance(done.exception, ConfigError)


def test_experts_that_change_places_or_are_lossy_are_said(tmp_path):
    config = {
        "model_type": "mixtral",
        "architectures": ["MixtralForCausalLM"],
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 8,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "vocab_size": 1000,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    words = ["--for", "rtx4060-laptop", "--sparsity", "0.5", "--explain"]
    found = run(tmp_path, *words)
    assert "experts that begin in VRAM" in found
    assert "experts change places with those in VRAM: a use there saves 1.00 of a copy" in found
    assert "lossy" not in found
    lossy = run(tmp_path, *words, "--experts", "lossy")
    assert "experts: lossy, replaced by others at hand" in lossy


def test_for_throughput_the_batch_is_searched_for_and_batch_is_the_most(packed):
    one = json.loads(run(packed, "--ram", "200MB", "--json"))
    found = json.loads(run(packed, "--ram", "200MB", "--goal", "throughput", "--json"))
    few = json.loads(
        run(packed, "--ram", "200MB", "--goal", "throughput", "--batch", "2", "--json")
    )
    assert one["workload"]["batch"] == 1
    assert found["workload"]["batch"] > 2
    assert found["alternatives"][0]["batch"] == found["workload"]["batch"]
    assert few["workload"]["batch"] <= 2
    rates = [each["decode"]["tokens_per_s"] for each in (one, few, found)]
    assert rates == sorted(rates)


def test_a_sketch_for_throughput_names_the_batch_and_the_rate_of_each_sequence(tmp_path):
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 4096,
        "intermediate_size": 16384,
        "num_hidden_layers": 80,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 1000,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    words = ["--for", "rtx4060-laptop", "--sparsity", "0.5", "--fast", "--goal", "throughput"]
    assert "of each sequence" in run(tmp_path, *words)
    assert "not measured" in run(tmp_path, *words, "--explain")
    (way,) = json.loads(run(tmp_path, *words, "--json"))["ways"]
    assert way["batch"] > 1
