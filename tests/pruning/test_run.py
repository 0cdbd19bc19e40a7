"""A calibrated pruning is one call of the library, and the same one that the command makes."""

import json
from contextlib import closing

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

import endor
from endor.checkpoint import open_source, unpack_checkpoint
from endor.checkpoint.select import select
from endor.cli.main import cli
from endor.errors import ConfigError
from endor.packing import prune_checkpoint, prune_to_masks
from endor.pruning import PruneOptions, load_masks
from endor.pruning.run import described, resolved
from endor.pruning.source import PrunedSource
from endor.quantization import QuantizeOptions


def weights(folder):
    return load_file(folder / "model.safetensors")


def assert_same(one, other):
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor.view(torch.int32), other[name].view(torch.int32)), name


@pytest.fixture
def options(text):
    return PruneOptions(method="wanda", calibration=(text,), samples=20, seq_len=32)


@pytest.fixture
def model(tmp_path, save):
    save(tmp_path / "model", "llama")
    return tmp_path / "model"


def test_the_library_prunes_with_calibration(tmp_path, model, options):
    with closing(open_source(model)) as source:
        selected = select(source.tensors.values())
        with closing(PrunedSource(source, options, selected)) as found:
            prune_checkpoint(found, tmp_path / "wanted", prune=None)
            about = found.describe()
    told = []
    endor.pack_checkpoint(
        model, tmp_path / "packed", prune=options, layers=lambda *what: told.append(what[:2])
    )
    unpack_checkpoint(tmp_path / "packed", tmp_path / "unpacked")
    report = prune_checkpoint(model, tmp_path / "dense", prune=options)
    masks = prune_to_masks(model, tmp_path / "masks", prune=options)
    wanted = weights(tmp_path / "wanted")
    assert_same(weights(tmp_path / "unpacked"), wanted)
    assert_same(weights(tmp_path / "dense"), wanted)
    assert all(
        torch.equal(mask, wanted[name] != 0)
        for name, mask in load_masks(tmp_path / "masks").items()
    )
    assert report.zeros == masks.zeros > 0
    assert told[-1] == (3, 3)
    config = json.loads((tmp_path / "packed" / "config.json").read_text())
    assert config["quantization_config"]["prune"] == about


def test_the_command_makes_the_same_files(tmp_path, model, options, text):
    endor.pack_checkpoint(model, tmp_path / "a", prune=options)
    words = ["pack", model, tmp_path / "b", "--prune", "wanda", "--calibration", text]
    words += ["--samples", 20, "--seq-len", 32]
    result = CliRunner().invoke(cli, list(map(str, words)))
    assert result.exit_code == 0, result.output
    for one in (tmp_path / "a").iterdir():
        assert one.read_bytes() == (tmp_path / "b" / one.name).read_bytes(), one.name


def test_the_library_quantises(tmp_path, model, options, text):
    coded = QuantizeOptions(bits=4.0)
    report = prune_checkpoint(model, tmp_path / "dense", prune=options, quantize=coded)
    assert report.quantize["bits"] == 4.0
    endor.pack_checkpoint(model, tmp_path / "packed", prune=options, quantize=coded)
    unpack_checkpoint(tmp_path / "packed", tmp_path / "unpacked")
    assert_same(weights(tmp_path / "unpacked"), weights(tmp_path / "dense"))
    rounded = prune_checkpoint(
        model, tmp_path / "rounded", prune="magnitude", quantize=coded, calibrate=False
    )
    assert rounded.quantize["method"] == "round"
    assert rounded.sparsity >= 0.5


def test_what_is_refused_leaves_nothing(tmp_path, model, options):
    out = tmp_path / "out"
    with pytest.raises(ConfigError, match="need calibration text"):
        endor.pack_checkpoint(
            model, out, prune=options, quantize=QuantizeOptions(), calibrate=False
        )
    with pytest.raises(ConfigError, match="sparsity: must be in"):
        endor.pack_checkpoint(model, out, prune="wanda", sparsity=1.5)
    assert not list(tmp_path.glob("out*"))


def test_what_a_caller_may_say():
    assert resolved(None, 0.5, "unstructured").method == "none"
    assert resolved("wanda", 0.25, "2:4") == PruneOptions(
        method="wanda", sparsity=0.25, pattern="2:4"
    )

    class Mine:
        def prune(self, name, weight):
            return weight

    mine = Mine()
    assert resolved(mine, 0.5, "2:4") is mine
    assert described(mine) == {"method": "mine"}
