"""Rows of first matrices that a predictor leaves out: asked for alone, said everywhere, as told."""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from transformers import AutoModelForCausalLM

import endor
from endor.checkpoint import inspect_checkpoint, unpack_checkpoint, verify_checkpoint
from endor.checkpoint.predictors import (
    PREDICTORS_NAME,
    Predictor,
    Predictors,
    parse_predictors,
    read_predictors,
)
from endor.cli.main import cli
from endor.errors import CheckpointError, ChecksumError, ConfigError, EndorError, FormatError
from endor.hf import device_map as places
from endor.hf.row_choice import WORTH
from endor.models.outline import outline
from endor.packing import pack, pack_checkpoint
from endor.planning import Placement
from endor.planning.constants import typical
from endor.planning.unit_cost import ROWS_APART, unit_costs
from endor.storage import FileLayout
from endor.storage.safetensors import Header, file_head

from ..support.fake_device import FakeDevice
from .conftest import config_of, prompt

NEURONS, HIDDEN = 96, 64
FIRST = {"opt": "model.decoder.layers.{}.fc1", "llama": "model.layers.{}.mlp.gate_proj"}


def layouts_of(packed: Path) -> list[FileLayout]:
    return [FileLayout.read(path) for path in sorted(packed.glob("endor-*.safetensors"))]


def drawn(layer: int) -> Predictor:
    """Return a predictor that names about half of the neurons, whatever they do."""
    rng = np.random.default_rng(layer)

    def bits(*shape: int) -> np.ndarray:
        return (rng.standard_normal(shape).astype(np.float32).view(np.uint32) >> 16).astype("<u2")

    bias = rng.standard_normal(NEURONS).astype(np.float32)
    return Predictor(bits(4, HIDDEN), bits(NEURONS, 4), bias, 0.75, 0.5, 0.25)


def naming(all_of_them: bool) -> Callable[[int], Predictor]:
    """Return what makes predictors that name all neurons but two, or none."""

    def made(layer: int) -> Predictor:
        bias = np.full(NEURONS, 1.0 if all_of_them else -1.0, np.float32)
        zeros = np.zeros((4, HIDDEN), "<u2"), np.zeros((NEURONS, 4), "<u2")
        return Predictor(*zeros, bias, 1.0, float(all_of_them), 0.25)

    return made


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return what packs a model with predictors that were not fitted; and the dense model."""

    def packed(
        kind: str = "opt",
        dtype: torch.dtype = torch.float32,
        made: Callable[[int], Predictor] = drawn,
    ) -> tuple[Path, Any]:
        torch.manual_seed(0)
        changes = {"hidden_act": "relu", "mlp_bias": True} if kind == "llama" else {}
        dense = AutoModelForCausalLM.from_config(config_of(kind, **changes), dtype=dtype).eval()
        with torch.no_grad():
            for name, bias in dense.named_parameters():
                if name.endswith(("fc1.bias", "gate_proj.bias", "up_proj.bias")):
                    bias.normal_()
        dense.save_pretrained(tmp_path / "dense")

        def predicting(*_: Any) -> Mapping[str, Any]:
            names = {f"{FIRST[kind].format(layer)}.weight": made(layer) for layer in range(3)}
            found = Predictors(names, 0.7, 500, {"texts": ["some.txt"]})
            return {PREDICTORS_NAME: lambda folder: found.to_bytes(layouts_of(folder))}

        monkeypatch.setattr(pack, "predicting", predicting)
        pack_checkpoint(tmp_path / "dense", tmp_path / "packed", neurons=True, predict=True)
        return tmp_path / "packed", dense

    return packed


def masked_logits(dense: Any, kind: str, ids: torch.Tensor) -> torch.Tensor:
    """Return what the dense model says where neurons that no token's predictor names are idle."""
    handles = []
    for layer in range(3):
        found = drawn(layer)
        down, up = (
            torch.from_numpy(each.astype(np.uint32) << 16).view(torch.float32)
            for each in (found.down, found.up)
        )

        def mask(_m: Any, args: Any, out: torch.Tensor, parts: Any = (down, up, found)) -> Any:
            x = args[0].reshape(-1, HIDDEN).float()
            scores = x @ parts[0].T @ parts[1].T + torch.from_numpy(parts[2].bias.copy())
            named = (scores > 0).any(0)
            return out if named.sum() > WORTH * NEURONS else out * named.to(out.dtype)

        module = dense.get_submodule(FIRST[kind].format(layer))
        handles.append(module.register_forward_hook(mask))
    out: torch.Tensor = dense(ids).logits
    for handle in handles:
        handle.remove()
    return out


@pytest.mark.parametrize("kind", ["opt", "llama"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tier", ["resident", "disk"])
@torch.no_grad()
def test_neurons_that_are_not_named_are_idle(
    make: Any, kind: str, dtype: torch.dtype, tier: Any
) -> None:
    packed, dense = make(kind, dtype)
    units = endor.load_model(packed, exact=True).endor.units
    tiers = dict.fromkeys((unit.name for unit in units), tier)
    placement = Placement(tiers, 4 * max(unit.nbytes for unit in units))
    model = endor.load_model(packed, exact=False, predict=True, placement=placement)
    plain = endor.load_model(packed, exact=False, placement=placement)
    bound = 2e-5 if dtype == torch.float32 else 0.05
    for ids in (prompt(batch=1, length=1), prompt(batch=1, length=1)):
        expected, own = masked_logits(dense, kind, ids), dense(ids).logits
        found, exact = model(ids).logits, plain(ids).logits
        largest = expected.abs().max()
        assert (found - expected).abs().max() <= bound * largest
        assert (exact - own).abs().max() <= bound * largest
        assert (found - own).abs().max() > 5 * bound * largest  # lossy: another model
    counters = model.endor.ledger.counters
    assert 0 < counters.lossy_rows_named < counters.lossy_rows
    assert plain.endor.ledger.counters.lossy_rows == 0
    for each in (model, plain):
        each.endor.close()


@torch.no_grad()
def test_several_tokens_share_the_rows(make: Any) -> None:
    """What one of them may have active is multiplied for all; above eight, all rows are."""
    packed, dense = make()
    model = endor.load_model(packed, exact=False, predict=True)
    for ids in (prompt(batch=1, length=2), prompt(batch=2, length=1)):
        expected = masked_logits(dense, "opt", ids)
        assert (model(ids).logits - expected).abs().max() <= 2e-5 * expected.abs().max()
    model.endor.ledger.clear()
    many = prompt(batch=2, length=5)
    expected = dense(many).logits
    assert (model(many).logits - expected).abs().max() <= 2e-5 * expected.abs().max()
    assert model.endor.ledger.counters.lossy_rows == 0
    model.endor.close()


@torch.no_grad()
def test_a_predictor_that_names_none(make: Any) -> None:
    """What it gives then is the block's second bias alone, and no row is multiplied."""
    packed, _ = make(made=naming(False))
    model = endor.load_model(packed, exact=False, predict=True)
    layer = model.model.decoder.layers[0]
    x = torch.randn(1, 1, HIDDEN)
    assert bool((layer.fc1(x) == 0).all())
    assert torch.equal(layer.fc2(layer.fc1(x)).reshape(-1), layer.fc2.bias)
    model.endor.close()


@torch.no_grad()
def test_a_predictor_that_names_all_changes_nothing(make: Any) -> None:
    packed, _ = make(made=naming(True))
    model, plain = (endor.load_model(packed, exact=False, predict=each) for each in (True, False))
    ids = prompt(batch=1, length=1)
    assert torch.equal(model(ids).logits, plain(ids).logits)
    assert model.endor.ledger.counters.lossy_rows == 0
    for each in (model, plain):
        each.endor.close()


def test_it_says_that_it_is_lossy(make: Any) -> None:
    packed, _ = make()
    model = endor.load_model(packed, exact=False, predict=True)
    assert model.endor.report()["predicted"] == 3
    assert model.config.quantization_config.predict is True
    assert model.endor_plan.workload.predict
    assert "dense" not in model.endor_plan.tiers.values()
    wanted = read_predictors(packed, layouts_of(packed))
    assert wanted is not None
    reserved = {item.what: item.nbytes for item in model.endor_plan.reservations}
    wide = sum(nbytes for _, nbytes in wanted.named.values())
    assert reserved["predictors of neurons"] == wide > wanted.nbytes
    plain = endor.load_model(packed, exact=False)
    assert plain.endor.report()["predicted"] == 0
    assert not plain.config.quantization_config.predict
    for each in (model, plain):
        each.endor.close()
    found = inspect_checkpoint(packed).to_dict()["predictors"]
    assert found["lossy"] is True
    assert (found["matrices"], found["asked_recall"], found["tokens"]) == (3, 0.7, 500)
    assert (found["recall"], found["rows"], found["active"]) == pytest.approx((0.75, 0.5, 0.25))
    said = CliRunner().invoke(cli, ["inspect", str(packed)]).output
    assert "predictors, lossy, used with --predict alone: 3 blocks" in said
    assert "they name 50.0% of the neurons and find 75.00% of the active ones" in said


def test_the_plan_says_so(make: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    packed, _ = make()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    words = ["plan", str(packed), "--fast", "--for", "rtx4090", "--vram", "0"]
    said = CliRunner().invoke(cli, [*words, "--predict"])
    assert said.exit_code == 0, said.output
    assert "predict: lossy" in said.output
    assert "predictors of neurons" in said.output
    assert "predict" not in CliRunner().invoke(cli, words).output.replace("predicted", "")
    wrong = CliRunner().invoke(cli, ["plan", str(packed), "--predict"])
    assert isinstance(wrong.exception, ConfigError)
    dense = CliRunner().invoke(cli, ["plan", str(tmp_path / "dense"), "--fast", "--predict"])
    assert dense.exit_code == 2
    assert "packed checkpoints" in dense.output


def test_what_is_refused(make: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    packed, _ = make()
    with pytest.raises(ConfigError, match=r"goes with exact=False \(--fast\)"):
        endor.load_model(packed, predict=True)
    with pytest.raises(ConfigError, match="predict must be True or False, got 'yes'"):
        endor.load_model(packed, exact=False, predict="yes")
    pack_checkpoint(tmp_path / "dense", tmp_path / "plain", neurons=True)
    with pytest.raises(ConfigError, match="has no predictors: pack the model with"):
        endor.load_model(tmp_path / "plain", exact=False, predict=True)
    monkeypatch.setattr(places, "open_device", lambda name: FakeDevice(total_bytes=1 << 30))
    monkeypatch.setattr(places, "refuse", lambda device: None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(ConfigError, match="weights that the processor multiplies"):
        endor.load_model(
            packed, exact=False, predict=True, device="cuda:0", context=64, host_compute="off"
        )


def test_the_dense_checkpoint_knows_nothing_of_it(make: Any, tmp_path: Path) -> None:
    packed, _ = make()
    report = unpack_checkpoint(packed, tmp_path / "back")
    assert not (tmp_path / "back" / PREDICTORS_NAME).exists()
    assert not report.left_out
    assert verify_checkpoint(packed, against=tmp_path / "dense").ok
    pack_checkpoint(packed, tmp_path / "again", neurons=True)
    assert not (tmp_path / "again" / PREDICTORS_NAME).exists()
    assert verify_checkpoint(tmp_path / "again").ok


# ---- the file ----------------------------------------------------------------------------------


def test_a_file_is_missing_or_another_ones(make: Any, tmp_path: Path) -> None:
    packed, _ = make()
    content = (packed / PREDICTORS_NAME).read_bytes()
    (packed / PREDICTORS_NAME).unlink()
    with pytest.raises(CheckpointError, match="is missing, and the index names it"):
        endor.load_model(packed, exact=False, predict=True)
    assert any(PREDICTORS_NAME in each for each in verify_checkpoint(packed).problems)
    endor.load_model(packed, exact=False).endor.close()  # who does not ask does not need it
    pack_checkpoint(tmp_path / "dense", tmp_path / "plain", neurons=True)
    (tmp_path / "plain" / PREDICTORS_NAME).write_bytes(content)
    with pytest.raises(CheckpointError, match="is not in the index"):
        endor.load_model(tmp_path / "plain", exact=False, predict=True)
    other = tmp_path / "other"
    pack_checkpoint(tmp_path / "dense", other, neurons=True, prune="magnitude")
    with pytest.raises(CheckpointError, match="another packing's"):
        _parse(content, other, tmp_path)


def _parse(content: bytes, shards: Path, tmp_path: Path) -> Predictors:
    path = tmp_path / f"copy-{PREDICTORS_NAME}"
    path.write_bytes(content)
    return parse_predictors(path, layouts_of(shards))


def test_any_changed_byte_is_found(make: Any, tmp_path: Path) -> None:
    packed, _ = make()
    content = (packed / PREDICTORS_NAME).read_bytes()
    rng = np.random.default_rng(0)
    places_ = {0, 8, 9, len(content) - 1, *rng.integers(0, len(content), 60).tolist()}
    for at in places_:
        changed = bytearray(content)
        changed[at] ^= 1 << int(rng.integers(8))
        with pytest.raises(EndorError, match=PREDICTORS_NAME):
            _parse(bytes(changed), packed, tmp_path)
    for length in (0, 7, 100, len(content) - 1):
        with pytest.raises(EndorError, match=PREDICTORS_NAME):
            _parse(content[:length], packed, tmp_path)


WRONG: list[tuple[str, Callable[[Any], Any], str]] = [
    ("recall", lambda about: about | {"recall": 1.5}, "recall a share"),
    ("tokens", lambda about: about | {"tokens": -1}, "tokens must be a count"),
    ("calibration", lambda about: about | {"calibration": 3}, "calibration an object"),
    ("version", lambda about: about | {"version": 2}, "must be of version 1"),
    ("members", lambda about: about | {"more": 2}, "must be of version 1 and hold"),
    ("found", lambda about: about | {"found": {}}, "must be of the same matrices"),
]


@pytest.mark.parametrize(("what", "change", "said"), WRONG, ids=[each[0] for each in WRONG])
def test_what_it_says_makes_sense(
    make: Any, tmp_path: Path, what: str, change: Callable[[Any], Any], said: str
) -> None:
    """Each rule by itself, with a checksum that is right."""
    from endor.checkpoint import beside

    packed, _ = make()
    header = Header.read(packed / PREDICTORS_NAME)
    data = (packed / PREDICTORS_NAME).read_bytes()[header.data_start :]
    about = json.loads(header.metadata["endor.predictors"])
    about.pop("checksum")
    about = change(about)
    about["checksum"] = beside._checksum(about, header.entries, data)
    content = file_head(header.entries.items(), {"endor.predictors": json.dumps(about)}) + data
    with pytest.raises(FormatError, match=said):
        _parse(content, packed, tmp_path)


BAD: list[tuple[str, dict[str, Any], str]] = [
    ("nan", {"bias": np.full(NEURONS, np.nan, np.float32)}, "fc1.weight_bias: must be finite"),
    ("infinite", {"up": np.full((NEURONS, 4), 0x7F80, "<u2")}, "fc1.weight_up: must be finite"),
    ("rank", {"up": np.zeros((NEURONS, 5), "<u2")}, r"weight_up: must be BF16 \[96, 4\]"),
    ("rows", {"bias": np.zeros(NEURONS - 1, np.float32)}, r"weight_bias: must be F32 \[96\]"),
    ("cols", {"down": np.zeros((4, HIDDEN - 1), "<u2")}, r"weight_down: must be BF16 \[4, 64\]"),
    ("none", {"down": np.zeros((0, HIDDEN), "<u2")}, "a rank of at least 1"),
    ("flat", {"down": np.zeros(HIDDEN, "<u2")}, "a rank of at least 1"),
    ("share", {"recall": -0.1}, "must be shares from 0 to 1"),
]


@pytest.mark.parametrize(("what", "change", "said"), BAD, ids=[each[0] for each in BAD])
def test_arrays_make_sense(
    make: Any, tmp_path: Path, what: str, change: dict[str, Any], said: str
) -> None:
    packed, _ = make()
    layouts = layouts_of(packed)
    parts = {name: getattr(drawn(0), name) for name in Predictor.__slots__} | change
    name = "model.decoder.layers.0.fc1.weight"
    content = Predictors({name: Predictor(**parts)}, 0.9, 10).to_bytes(layouts)
    with pytest.raises(FormatError, match=said):
        _parse(content, packed, tmp_path)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("model.decoder.layers.0.fc2.weight", "must be a matrix that is stored by row"),
        ("model.decoder.layers.0.fc1.bias", "must be a matrix that is stored by row"),
    ],
)
def test_a_matrix_that_has_no_rows_of_neurons(
    make: Any, tmp_path: Path, name: str, said: str
) -> None:
    packed, _ = make()
    content = Predictors({name: drawn(0)}, 0.9, 10).to_bytes(layouts_of(packed))
    with pytest.raises(FormatError, match=said):
        _parse(content, packed, tmp_path)


def test_it_is_read_back(make: Any) -> None:
    packed, _ = make()
    found = read_predictors(packed, layouts_of(packed))
    assert found is not None
    for layer, (name, each) in enumerate(sorted(found.matrices.items())):
        assert name == f"model.decoder.layers.{layer}.fc1.weight"
        for part in ("down", "up", "bias"):
            expected = getattr(drawn(layer), part)
            assert np.array_equal(getattr(each, part).view("u1"), expected.view("u1"))
    shutil.copytree(packed, packed.parent / "moved")
    moved = packed.parent / "moved"
    assert read_predictors(moved, layouts_of(moved)) is not None
    assert issubclass(ChecksumError, EndorError)


def test_what_is_named_costs_less(make: Any) -> None:
    """By the share of the rows, which lie apart, and the predictor's own bytes."""
    packed, _ = make()
    found, machine = outline(packed), typical("F32")
    name = "model.decoder.layers.1.fc1.weight"
    plain, less, all_of_it = (
        {
            cost.name: cost.product_s
            for cost in unit_costs(found.units, machine, found.shape, None, named)
        }
        for named in (None, {name: (0.1, 1000)}, {name: (0.9, 1000)})
    )
    at = next(unit.name for unit in found.units if name in unit.tensors)
    own = 1000 / machine.read_gbps / 1e9
    assert less[at] == pytest.approx(plain[at] * ROWS_APART * 0.1 + own)
    assert all_of_it[at] == pytest.approx(plain[at] + own)
    assert {k: v for k, v in less.items() if k != at} == {k: v for k, v in plain.items() if k != at}
