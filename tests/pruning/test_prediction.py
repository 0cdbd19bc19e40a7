"""Predictors of active neurons: found again in tokens that they were not made from."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

import endor
from endor.checkpoint import inspect_checkpoint, verify_checkpoint
from endor.checkpoint.companions import PREDICTORS_NAME
from endor.cli.main import cli
from endor.errors import ConfigError
from endor.packing import pack_checkpoint
from endor.planning import machine as hardware
from endor.planning.constants import typical
from endor.pruning.contract import PruneOptions
from endor.pruning.prediction import Activity, Fitted, fit


def seen(tokens: int, cols: int, neurons: int, rank: int, noise: float, **how: Any) -> Activity:
    """Return a block whose neurons follow a few directions of its inputs, and some noise."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    weight = normal(neurons, rank) @ normal(rank, cols) / (rank * cols) ** 0.5
    weight += noise * normal(neurons, cols) / cols**0.5
    bias = how.get("bias", -1.5) + 0.5 * normal(neurons)
    found = Activity()
    for start in range(0, tokens, 500):
        x = normal(min(500, tokens - start), cols) + 0.5
        found.add(x, (x @ weight.T + bias).relu())
    return found


def named(made: Fitted, x: torch.Tensor) -> torch.Tensor:
    return x @ made.down.float().T @ made.up.float().T + made.bias > 0


@pytest.mark.parametrize("recall", [0.9, 0.99])
def test_active_neurons_are_named_and_few_others(recall: float) -> None:
    activity = seen(3000, 96, 200, 6, 0.05)
    made = fit(activity, recall=recall, rank=12)
    assert (made.down.shape, made.up.shape, made.bias.shape) == ((12, 96), (200, 12), (200,))
    assert (made.down.dtype, made.up.dtype, made.bias.dtype) == (
        *(torch.bfloat16, torch.bfloat16),
        torch.float32,
    )
    assert abs(made.recall - recall) < 0.02
    assert made.tokens == 500
    assert made.recall * made.active <= made.rows < 1.7 * made.active


def test_what_is_told_of_it_is_so() -> None:
    activity = seen(3000, 96, 200, 6, 0.2)
    made = fit(activity, recall=0.97, rank=8)
    guess = named(made, activity.inputs()[2500:].float())
    truth = activity.bits().at(slice(2500, 3000)) != 0
    assert made.rows == pytest.approx(float(guess.float().mean()), abs=1e-3)
    assert made.active == pytest.approx(float(truth.float().mean()), abs=1e-6)
    assert made.recall == pytest.approx(float((guess & truth).sum() / truth.sum()), abs=1e-3)


def test_more_is_asked_for_more_is_named() -> None:
    activity = seen(3000, 96, 200, 6, 0.3)
    rows = [fit(activity, recall=recall, rank=8).rows for recall in (0.8, 0.95, 0.999)]
    assert rows == sorted(rows)
    assert rows[0] < rows[2] - 0.1


def test_what_nothing_predicts_is_named_whole() -> None:
    """A rank far below that of the weight: no few rows hold 99 % of what is active."""
    made = fit(seen(3000, 96, 200, 96, 1.0, bias=0.0), recall=0.99, rank=2)
    assert made.rows > 0.9


@pytest.mark.parametrize("bias", [-100.0, 100.0])
def test_neurons_that_are_never_or_always_active(bias: float) -> None:
    made = fit(seen(700, 32, 40, 4, 0.1, bias=bias), recall=0.99)
    assert made.down.shape == (32, 32)
    assert bool(torch.isfinite(made.bias).all())
    assert bool(torch.isfinite(made.up.float()).all())
    assert made.active == (bias > 0)
    assert made.recall >= 0.98
    assert made.rows == 1.0 if bias > 0 else made.rows < 0.02


@pytest.mark.parametrize("tokens", [6, 50])
def test_few_tokens(tokens: int) -> None:
    made = fit(seen(tokens, 16, 24, 4, 0.1), recall=0.99)
    assert bool(torch.isfinite(made.bias).all())
    assert 0 <= made.recall <= 1


def test_equal_seeds_give_equal_predictors() -> None:
    one, two = (fit(seen(600, 32, 40, 4, 0.1), recall=0.95) for _ in range(2))
    assert torch.equal(one.down.view(torch.int16), two.down.view(torch.int16))
    assert torch.equal(one.up.view(torch.int16), two.up.view(torch.int16))
    assert torch.equal(one.bias.view(torch.int32), two.bias.view(torch.int32))


def relu_model(save: Any, path: Path, kind: str, **changes: Any) -> Path:
    model = save(path, kind, torch.bfloat16)
    if changes:
        model.config.update(changes)
        model = type(model)(model.config).bfloat16()
    with torch.no_grad():
        for name, bias in model.named_parameters():
            if name.endswith(("fc1.bias", "gate_proj.bias")):
                bias.copy_(torch.linspace(0.5, -3.0, len(bias)))
    model.save_pretrained(path)
    return path


@pytest.mark.parametrize(
    ("kind", "changes", "leaf"),
    [
        ("opt", {}, "fc1"),
        ("llama", {"hidden_act": "relu", "mlp_bias": True}, "gate_proj"),
    ],
)
def test_packing_makes_them_from_calibration_text(
    save: Any, text: Path, tmp_path: Path, kind: str, changes: Any, leaf: str
) -> None:
    """Of a gated block the gate's rows are named; what is told of them holds for the model."""
    dense = relu_model(save, tmp_path / "dense", kind, **changes)
    how = PruneOptions(method="none", calibration=(text,), samples=12, seq_len=24)
    out = tmp_path / "packed"
    pack_checkpoint(dense, out, prune=how, neurons=True, predict=True, recall=0.9)
    assert verify_checkpoint(out, against=dense).ok
    found = inspect_checkpoint(out).predictors
    assert found is not None
    assert found.matrices
    assert all(name.endswith(f".{leaf}.weight") for name in found.matrices)
    assert (found.recall, found.calibration["texts"]) == (0.9, [text.name])
    assert found.tokens == 12 * 24 - 12 * 24 * 5 // 6
    assert all(each.rows <= 0.6 for each in found.matrices.values())
    model = endor.load_model(out, exact=False, predict=True)
    assert model.endor.predicted == len(found.matrices)
    with torch.no_grad():
        for token in range(3, 12):
            model(torch.tensor([[token]]))
    counters = model.endor.ledger.counters
    assert 0 < counters.lossy_rows_named < 0.7 * counters.lossy_rows
    model.endor.close()


def test_the_command_says_what_it_made(
    save: Any, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # by constants of this machine, matrices so small may be expanded instead
    monkeypatch.setattr(hardware, "machine", lambda dtype="BF16", **_: typical(dtype))
    dense = relu_model(save, tmp_path / "dense", "opt")
    words = ["pack", str(dense), str(tmp_path / "packed"), "--neurons", "--predict"]
    words += ["--recall", "0.9", "--calibration", str(text), "--samples", "12", "--seq-len", "24"]
    said = CliRunner().invoke(cli, words)
    assert said.exit_code == 0, said.output
    assert "predictors, lossy, used with --predict alone:" in said.output
    words = ["generate", str(tmp_path / "packed"), "--prompt", "abc", "--max-new-tokens", "3"]
    lossy = CliRunner().invoke(cli, [*words, "--fast", "--predict"])
    assert lossy.exit_code == 0, lossy.output
    assert "predict  lossy: of" in lossy.output
    assert "the text is not the model's own" in lossy.output
    facts = json.loads(CliRunner().invoke(cli, [*words, "--fast", "--predict", "--json"]).stdout)
    assert facts["predicted"] > 0
    assert facts["exact"] is False
    assert 0 < facts["rows_multiplied"] < 1
    plain = CliRunner().invoke(cli, [*words, "--fast"])
    assert "lossy" not in plain.output
    assert isinstance(CliRunner().invoke(cli, [*words, "--predict"]).exception, ConfigError)


def test_an_activation_without_zeros_stays_exact(save: Any, text: Path, tmp_path: Path) -> None:
    save(tmp_path / "dense", "llama", torch.bfloat16)
    words = ["pack", str(tmp_path / "dense"), str(tmp_path / "packed"), "--neurons", "--predict"]
    said = CliRunner().invoke(cli, [*words, "--calibration", str(text)])
    assert said.exit_code == 0, said.output
    assert "config.json names silu, which is not exactly zero" in said.output
    assert "there is nothing to predict, and the model stays exact" in said.output
    assert not (tmp_path / "packed" / PREDICTORS_NAME).exists()
    assert verify_checkpoint(tmp_path / "packed", against=tmp_path / "dense").ok


def test_what_makes_no_sense(save: Any, text: Path, tmp_path: Path) -> None:
    dense = relu_model(save, tmp_path / "dense", "opt")
    out, how = tmp_path / "out", PruneOptions(method="none", calibration=(text,))
    for recall in (0.3, 1.0, float("nan")):
        with pytest.raises(ConfigError, match=r"recall: must be from 0\.5"):
            pack_checkpoint(dense, out, prune=how, neurons=True, predict=True, recall=recall)
    with pytest.raises(ConfigError, match="predict: goes with neurons"):
        pack_checkpoint(dense, out, prune=how, predict=True)
    for words in (["--predict"], ["--neurons", "--recall", "0.9"]):
        said = CliRunner().invoke(cli, ["pack", str(dense), str(out), *words])
        assert said.exit_code == 2, said.output
    assert not list(tmp_path.glob("out*"))
