"""Ids of the Hub as arguments of commands."""

import json
import shutil

import pytest
import torch
import transformers
from click.testing import CliRunner

import endor
from endor.cli.main import cli
from endor.planning import probes


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A model that transformers makes, dense and packed."""
    root = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
    )
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(root / "source", max_shard_size="100KB")
    endor.pack_checkpoint(root / "source", root / "packed", prune="magnitude")
    return root


def run(*arguments):
    return CliRunner().invoke(cli, [str(argument) for argument in arguments], catch_exceptions=True)


def test_pack(server, model, tmp_path):
    first = server.add("org/name", model).branches["main"]
    (model / "config.json").write_text('{"model_type": "gpt2"}')
    server.add("org/name", model)
    result = run("pack", "org/name", tmp_path / "out", "--revision", first, "--json")
    assert result.exit_code == 0, result.output
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["model_type"] == "llama"
    assert config["quantization_config"]["source"] == {"repo": "org/name", "commit": first}
    assert f"packed from org/name at {first}" in run("inspect", tmp_path / "out").output
    assert (
        f"[org/name](https://huggingface.co/org/name) at [{first[:12]}]"
        in run("card", tmp_path / "out").output
    )
    assert run("verify", tmp_path / "out", "--against", f"org/name@{first}").exit_code == 0
    out = run("prune", "org/name", tmp_path / "pruned", "--method", "magnitude")
    assert out.exit_code == 0, out.output
    quantized = run("quantize", "org/name", tmp_path / "q", "--bits", 4, "--calibration", "none")
    assert quantized.exit_code == 0, quantized.output


def test_a_path_outside_of_the_cache_is_not_stored(server, model, tmp_path):
    for folder in (model, tmp_path / "models--org--name" / "snapshots" / "main"):
        if folder != model:
            shutil.copytree(model, folder)
        assert run("pack", folder, tmp_path / "out", "--overwrite").exit_code == 0
        config = (tmp_path / "out/config.json").read_text()
        assert "source" not in json.loads(config)["quantization_config"]
        assert str(tmp_path) not in config
        assert json.loads(run("inspect", tmp_path / "out", "--json").output)["source"] is None


@pytest.mark.parametrize(
    "said", [7, {}, {"repo": "org/name"}, {"repo": "../x", "commit": "0" * 40}, {"repo": 1}]
)
def test_an_origin_that_makes_no_sense_is_not_shown(llama, tmp_path, said):
    packed = shutil.copytree(llama / "packed", tmp_path / "packed")
    config = json.loads((packed / "config.json").read_text())
    config["quantization_config"]["source"] = said
    (packed / "config.json").write_text(json.dumps(config))
    result = run("inspect", packed)
    assert result.exit_code == 0
    assert "packed from" not in result.output


def test_nothing_is_fetched_where_out_exists(server, model, tmp_path):
    server.add("org/name", model)
    (tmp_path / "out").mkdir()
    (tmp_path / "out/file").write_text("mine")
    assert run("pack", "org/name", tmp_path / "out").exit_code == 1
    assert not server.requests


def test_packed_ones(server, llama, tmp_path):
    server.add("org/packed", llama / "packed")
    server.add("org/dense", llama / "source")
    for command in (
        ["inspect", "org/packed"],
        ["verify", "org/packed"],
        ["unpack", "org/packed", tmp_path / "dense"],
    ):
        result = run(*command)
        assert result.exit_code == 0, result.output
    assert run("inspect", "org/packed", "--revision", "v2").exit_code == 1
    loaded = endor.load_model("org/packed")
    assert type(loaded).__name__ == "LlamaForCausalLM"


def test_plan_fetches_headers_only(server, llama, tmp_path, monkeypatch):
    server.add("org/packed", llama / "packed")
    server.add("org/dense", llama / "source")
    here = run("plan", llama / "packed", "--for", "rtx4090", "--json")
    there = run("plan", "org/packed", "--for", "rtx4090", "--json")
    assert there.exit_code == 0, there.output
    assert json.loads(there.output) == json.loads(here.output)
    shard = next(path for path in (llama / "packed").iterdir() if path.suffix == ".safetensors")
    assert 0 < server.sent[shard.name] < shard.stat().st_size
    assert not list((tmp_path / "cache").glob("endor-plan-*"))

    dense = run("plan", "org/dense", "--for", "rtx4090", "--bits", "4")
    assert dense.exit_code == 0, dense.output
    assert not [name for name in server.sent if name.startswith("model-")]
    assert "not a model on the Hub" not in dense.output

    measured = []
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setattr("endor.planning.machine.store", lambda *entry: None)
    monkeypatch.setattr("endor.planning.machine._remembered_disk", lambda key: None)
    whole = probes.disk

    def disk(path, **options):
        measured.append((path.name, path.stat().st_blocks > 0))
        return whole(path, **options)

    monkeypatch.setattr(probes, "disk", disk)
    assert run("plan", "org/packed").exit_code == 0
    assert measured == [("probe", True)], "the disk is measured by a file that is there"


def test_eval_names_what_was_given(server, llama, tmp_path):
    """A model is called by its id, and not by the folder of a commit."""
    tokenizer = pytest.importorskip("tokenizers")
    words = tokenizer.Tokenizer(tokenizer.models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    words.pre_tokenizer = tokenizer.pre_tokenizers.Whitespace()
    folder = tmp_path / "packed"
    shutil.copytree(llama / "packed", folder)
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="a")
    fast.save_pretrained(folder)
    server.add("org/packed", folder)
    (tmp_path / "text.txt").write_text("a b b a " * 40)
    options = ["--text", tmp_path / "text.txt", "--window", 16, "--max-windows", 2]
    result = run("eval", "org/packed", *options)
    assert result.exit_code == 0, result.output
    assert "\npacked " in result.output
    assert run("--quiet", "eval", "org/packed", *options, "--json").output.count("org/packed") == 1
