"""pack, prune, unpack, verify and inspect, as a user types them."""

import json
import subprocess
import sys

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file

from endor.cli.main import cli
from endor.errors import OutputExistsError

SHAPES = {"q_proj": (64, 64), "up_proj": (96, 64), "down_proj": (64, 96)}


@pytest.fixture
def model(tmp_path):
    path = tmp_path / "model"
    path.mkdir()
    generator = torch.Generator().manual_seed(0)
    state = {"model.embed_tokens.weight": torch.randn(50, 64, generator=generator).bfloat16()}
    for layer in range(2):
        for name, shape in SHAPES.items():
            weight = torch.randn(shape, generator=generator).bfloat16()
            state[f"model.layers.{layer}.mlp.{name}.weight"] = weight
    save_file(state, path / "model.safetensors", metadata={"format": "pt"})
    (path / "config.json").write_text('{"model_type": "llama"}')
    return path


def run(*arguments):
    command = [sys.executable, "-m", "endor.cli.main", *map(str, arguments)]
    return subprocess.run(command, check=False, capture_output=True, text=True, timeout=120)


def invoke(*arguments):
    """Run a command in this process and return its standard output."""
    result = CliRunner().invoke(cli, list(map(str, arguments)), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_the_whole_way(tmp_path, model):
    packed, dense = tmp_path / "packed", tmp_path / "dense"
    assert "bits a weight" in invoke("pack", model, packed)
    assert "whole, and equal" in invoke("verify", packed, "--against", model)
    table = invoke("inspect", packed)
    assert "model.layers.1.mlp.down_proj.weight" in table
    assert "96x64" in table
    invoke("unpack", packed, dense)
    name = "model.safetensors"
    assert (dense / name).read_bytes() == (model / name).read_bytes()


def test_json(tmp_path, model):
    packed = tmp_path / "packed"
    report = json.loads(invoke("pack", model, packed, "--prune", "magnitude", "--json"))
    assert report["density"] == 0.5
    assert report["packed_tensors"] == 6
    assert 0 < report["bits_per_weight"] < 40  # records of such small matrices are mostly padding
    assert json.loads(invoke("inspect", packed, "--json"))["totals"]["density"] == 0.5
    verified = json.loads(invoke("verify", packed, "--json"))
    assert verified["ok"]
    assert verified["problems"] == []
    pruned = json.loads(
        invoke(
            "prune", model, tmp_path / "p", "--method", "magnitude", "--sparsity", 0.25, "--json"
        )
    )
    assert pruned["sparsity"] == 0.25
    unpacked = json.loads(invoke("unpack", packed, tmp_path / "dense", "--json"))
    assert unpacked["tensors"] == 7


def test_prune_says_what_makes_it_smaller(tmp_path, model):
    text = invoke("prune", model, tmp_path / "p", "--method", "magnitude", "--pattern", "2:4")
    assert "before and after" in text
    assert "endor pack" in text


def test_selection(tmp_path, model):
    packed = tmp_path / "packed"
    invoke("pack", model, packed, "--include", "*embed_tokens", "--exclude", "re:q_proj")
    tensors = json.loads(invoke("inspect", packed, "--json"))["tensors"]
    dense = {tensor["name"] for tensor in tensors if tensor["codec"] == "dense"}
    assert dense == {f"model.layers.{layer}.mlp.q_proj.weight" for layer in range(2)}


def assert_one_line(result, *words):
    """Fail unless the command failed with one line that holds `words`."""
    assert result.returncode == 1, result.stderr
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("endor: ")]
    assert "Traceback" not in result.stderr
    assert all(word in line for word in words), line


def missing_shard(model):
    (model / "model.safetensors").unlink()
    weight_map = {"a": "model-00001-of-00002.safetensors"}
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def truncated(model):
    path = model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def wrong_dtype(model):
    path = model / "model.safetensors"
    path.write_bytes(path.read_bytes().replace(b'"BF16"', b'"BF17"', 1))


def collision(model):
    name = "model.layers.0.mlp.q_proj.weight"
    state = {name: torch.ones(64, 64), f"{name}_bitmap": torch.ones(1)}
    save_file(state, model / "model.safetensors")


def no_output(model):
    (model.parent / "out").mkdir()
    (model.parent / "out" / "config.json").write_text("{}")


@pytest.mark.parametrize(
    ("prepare", "words"),
    [
        (missing_shard, ["1 of 1 shards are missing", "model-00001-of-00002.safetensors"]),
        (truncated, ["model.safetensors", "truncated"]),
        (wrong_dtype, ["dtype", "BF17"]),
        (collision, ["q_proj.weight_bitmap", "collides"]),
        (no_output, ["exists already", "--overwrite"]),
    ],
)
def test_one_line_for_each_way_to_fail(tmp_path, model, prepare, words):
    prepare(model)
    assert_one_line(run("pack", model, tmp_path / "out"), *words)
    assert not (tmp_path / "out.partial").exists()


def test_one_line_when_nothing_may_be_written(model):
    assert_one_line(run("pack", model, "/proc/self/out"), "/proc/self/out")


LIMITED = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))
from endor.cli.main import main
main()
"""


def test_one_line_when_the_disk_is_full(tmp_path, model):
    command = [sys.executable, "-c", LIMITED, "pack", str(model), str(tmp_path / "out")]
    result = subprocess.run(command, check=False, capture_output=True, text=True, timeout=120)
    assert_one_line(result, "endor-00001", "File too large")
    assert not list(tmp_path.glob("out*"))


def test_verify_exits_with_one_line_for_a_problem(tmp_path, model):
    packed = tmp_path / "packed"
    invoke("pack", model, packed)
    path = packed / "endor-00001-of-00001.safetensors"
    content = bytearray(path.read_bytes())
    content[-5000] ^= 1
    path.write_bytes(content)
    assert_one_line(run("verify", packed), str(path), "checksum must be")
    assert_one_line(run("unpack", packed, tmp_path / "dense"), str(path), "checksum must be")
    assert not list(tmp_path.glob("dense*"))


def test_resume(tmp_path, model):
    invoke("pack", model, tmp_path / "out", "--resume")
    assert_one_line(run("pack", model, tmp_path / "out", "--resume"), "exists already")
    invoke("pack", model, tmp_path / "out", "--overwrite")


@pytest.mark.parametrize(
    "options",
    [("--sparsity", "1.5"), ("--pattern", "4:2"), ("--codec", "zip"), ("--max-shard-size", "big")],
)
def test_wrong_usage_exits_with_2(tmp_path, model, options):
    result = CliRunner().invoke(cli, ["pack", str(model), str(tmp_path / "out"), *options])
    assert result.exit_code == 2
    assert options[0] in result.output


def test_the_source_called_partial_survives(tmp_path, model):
    """`endor pack m.partial m`: one line, exit 1, and the model is still there."""
    model.rename(tmp_path / "m.partial")
    before = (tmp_path / "m.partial" / "model.safetensors").read_bytes()
    result = run("pack", tmp_path / "m.partial", tmp_path / "m", "--prune", "magnitude")
    assert_one_line(result, "m.partial", "holds the input")
    assert (tmp_path / "m.partial" / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize(
    "words",
    [
        ("pack", "--prune", "wanda"),
        ("prune", "--method", "wanda"),
        ("prune", "--method", "wanda", "--mask-only"),
    ],
)
@pytest.mark.parametrize("overwrite", [False, True])
def test_out_is_looked_at_before_the_work(tmp_path, model, monkeypatch, words, overwrite):
    """Not after hours of calibration."""
    from endor.pruning import source

    def work(*_, **__):
        raise AssertionError("the calibration began")

    monkeypatch.setattr(source, "PrunedSource", work)
    command, *options = words
    out = tmp_path / "out"
    if "--mask-only" in options and overwrite:
        out.symlink_to(model / "config.json")
    elif "--mask-only" in options:
        out.touch()
    else:
        out.mkdir()
        (out / "model.safetensors").touch()
        (out / "thesis.txt").write_text("mine")
    if overwrite:
        options.append("--overwrite")
    result = CliRunner().invoke(cli, [command, str(model), str(out), *options])
    assert isinstance(result.exception, OutputExistsError), result.exception
    partial = tmp_path / "out.partial"
    if not out.is_file():
        for path in (out / "model.safetensors", out / "thesis.txt"):
            path.unlink()
        out.rmdir()
        partial.mkdir()
        (partial / "thesis.txt").write_text("mine")
        result = CliRunner().invoke(cli, [command, str(model), str(out), *options])
        assert isinstance(result.exception, OutputExistsError), result.exception


def test_what_is_left_out_is_named(tmp_path, model):
    (model / "model.onnx_data").write_text("other weights")
    (model / "original").mkdir()
    result = CliRunner().invoke(cli, ["pack", str(model), str(tmp_path / "out")])
    assert result.exit_code == 0
    assert "model.onnx_data, original/" in result.stderr
