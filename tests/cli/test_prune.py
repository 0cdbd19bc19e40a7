"""prune, as a user types it: masks, and where calibration text comes from."""

import json

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file

from endor.cli.main import cli
from endor.cli.pruning import CalibrationText
from endor.pruning import load_masks
from endor.pruning.calibration import shipped_texts

NAME = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture
def model(tmp_path):
    path = tmp_path / "model"
    path.mkdir()
    weight = torch.randn(96, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    save_file({NAME: weight}, path / "model.safetensors", metadata={"format": "pt"})
    (path / "config.json").write_text('{"model_type": "llama"}')
    return path


def invoke(*arguments, code=0):
    result = CliRunner().invoke(cli, list(map(str, arguments)))
    assert result.exit_code == code, result.output
    return result.output if code else result.stdout


def test_masks_take_one_bit_a_weight(model, tmp_path):
    out = tmp_path / "new" / "masks.safetensors"
    words = ("prune", model, out, "--method", "magnitude", "--mask-only")
    assert "are zero (0.5000)" in invoke(*words)
    (mask,) = load_masks(out).values()
    assert int(mask.sum()) == 96 * 64 // 2
    assert out.stat().st_size < 96 * 64 // 8 + 1000
    report = json.loads(invoke(*words, "--overwrite", "--json"))
    assert report["sparsity"] == 0.5
    assert report["pruned_tensors"] == 1
    invoke(*words, code=1)


def test_calibration_is_a_file_or_the_name_of_a_shipped_text(tmp_path):
    texts = CalibrationText()
    (tmp_path / "mine.txt").write_text("text")
    assert texts.convert("wiki", None, None) == shipped_texts("wiki")
    assert texts.convert("mix", None, None) == shipped_texts()
    assert texts.convert(str(tmp_path / "mine.txt"), None, None) == (tmp_path / "mine.txt",)


def test_a_text_that_is_not_there_is_refused(model, tmp_path):
    output = invoke("prune", model, tmp_path / "out", "--calibration", "no.txt", code=2)
    told = " ".join(output.split())
    assert "a file or one of wiki, austen, python, web, mix, got 'no.txt'" in told


def test_texts_add_up(model, tmp_path, monkeypatch):
    seen = []

    def run(model, out, *, prune, **rest):
        seen.append(prune.calibration)
        raise SystemExit(3)

    monkeypatch.setattr("endor.packing.prune_checkpoint", run)
    (tmp_path / "mine.txt").write_text("text")
    words = ("prune", model, tmp_path / "out", "--calibration", "austen")
    invoke(*words, "--calibration", tmp_path / "mine.txt", code=3)
    assert seen == [(*shipped_texts("austen"), tmp_path / "mine.txt")]
