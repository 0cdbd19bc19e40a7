"""`--neurons`: which matrices are stored transposed, and that everything else sees them as ever."""

import json
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open as stock_open

import endor
from endor.checkpoint import inspect_checkpoint, open_source, unpack_checkpoint, verify_checkpoint
from endor.checkpoint.neurons import ACTIVATION_KEYS, ZERO_ACTIVATIONS, find_neurons
from endor.errors import CheckpointError, ConfigError
from endor.packing import pack_checkpoint
from endor.storage import FileLayout

from .conftest import State, assert_same_tensors, weight, write_checkpoint

OPT: dict[str, Any] = {"model_type": "opt", "activation_function": "relu", "hidden_size": 64}


def finite(*shape: int, seed: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """Return weights without the NaN and the infinity that `weight` ends with."""
    return weight(*shape, seed=seed, dtype=dtype).nan_to_num(nan=0.5, posinf=-0.25)


def opt_state(dtype: torch.dtype = torch.bfloat16) -> State:
    state = {"model.decoder.embed_tokens.weight": finite(100, 64, seed=9, dtype=dtype)}
    for layer in range(2):
        prefix = f"model.decoder.layers.{layer}"
        state[f"{prefix}.self_attn.q_proj.weight"] = finite(64, 64, seed=layer, dtype=dtype)
        state[f"{prefix}.fc1.weight"] = finite(192, 64, seed=3 + layer, dtype=dtype)
        state[f"{prefix}.fc1.bias"] = finite(192, seed=5, dtype=dtype)
        state[f"{prefix}.fc2.weight"] = finite(64, 192, seed=6 + layer, dtype=dtype)
    return state


def opt(path: Path, state: State | None = None, config: dict[str, Any] | None = None) -> Path:
    model = write_checkpoint(path, state or opt_state())
    (model / "config.json").write_text(json.dumps(config or OPT))
    return model


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("codec", ["auto", "raw", "exp"])
@pytest.mark.parametrize("bundled", [False, True])
def test_round_trip(tmp_path: Path, dtype: torch.dtype, codec: Any, bundled: bool) -> None:
    state = opt_state(dtype)
    model = opt(tmp_path / "model", state)
    packed, back = tmp_path / "packed", tmp_path / "back"
    report = pack_checkpoint(
        model, packed, codec=codec, neurons=not bundled, bundle_neurons=bundled
    )
    assert report.sizes.neuron_tensors == 2
    assert not report.neurons_unused
    assert verify_checkpoint(packed, against=model).problems == ()
    rows = {row.name: row.spec for row in inspect_checkpoint(packed).rows}
    second = {name for name, spec in rows.items() if spec.transposed}
    assert second == {f"model.decoder.layers.{layer}.fc2.weight" for layer in range(2)}
    assert rows["model.decoder.layers.0.fc2.weight"].shape == (64, 192)
    with closing(open_source(packed)) as source:
        assert_same_tensors(source, state)
    unpack_checkpoint(packed, back)
    with closing(open_source(back)) as source:
        assert_same_tensors(source, state)
    assert json.loads((back / "config.json").read_text()) == OPT
    said = json.loads((packed / "config.json").read_text())["quantization_config"]
    assert (said["neurons"], said["format_version"]) == ("relu", 5 + bundled)
    assert all((rows[name].bundles is not None) == bundled for name in second)


@pytest.mark.parametrize("bundled", [False, True])
def test_a_packed_file_gives_the_tensor_as_it_is_named(tmp_path: Path, bundled: bool) -> None:
    state = opt_state()
    model = opt(tmp_path / "model", state)
    pack_checkpoint(model, tmp_path / "packed", neurons=True, bundle_neurons=bundled)
    file = next((tmp_path / "packed").glob("endor-*.safetensors"))
    name = "model.decoder.layers.1.fc2.weight"
    with endor.safe_open(file) as found:
        assert torch.equal(found.get_tensor(name).view(torch.int16), state[name].view(torch.int16))
        part = found.get_slice(name)[3:5, 10:100]
        assert torch.equal(part.view(torch.int16), state[name][3:5, 10:100].view(torch.int16))
        packed = found.get_packed(name)
    assert packed.shape == (64, 192)
    assert torch.equal(endor.decompress(packed).view(torch.int16), state[name].view(torch.int16))
    endor.save_file({"again": packed}, tmp_path / "again.safetensors")
    again = endor.load_file(tmp_path / "again.safetensors")["again"]
    assert torch.equal(again.view(torch.int16), state[name].view(torch.int16))
    with stock_open(file, "np") as stock:
        assert f"{name}_{'bundles' if bundled else 'planes'}" in stock.keys()  # noqa: SIM118 - it is no dict


def test_resumes_only_what_was_begun_so(tmp_path: Path) -> None:
    from endor.checkpoint.convert import _Run

    model, packed = opt(tmp_path / "model"), tmp_path / "packed"
    pack_checkpoint(model, tmp_path / "whole", neurons=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_Run, "name_shards", lambda self: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            pack_checkpoint(model, packed, neurons=True)
    for other in ({}, {"bundle_neurons": True}):
        with pytest.raises(CheckpointError):
            pack_checkpoint(model, packed, resume=True, **other)
    pack_checkpoint(model, packed, neurons=True, resume=True)
    for file in (tmp_path / "whole").glob("*.*"):
        assert file.read_bytes() == (packed / file.name).read_bytes(), file.name


def test_without_it_files_are_as_before(tmp_path: Path) -> None:
    pack_checkpoint(opt(tmp_path / "model"), tmp_path / "packed")
    layouts = [FileLayout.read(file) for file in (tmp_path / "packed").glob("endor-*.safetensors")]
    assert {layout.version for layout in layouts} == {1}
    text = (tmp_path / "packed" / "config.json").read_text()
    assert "neurons" not in text


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"hidden_act": "silu"}, "names silu, which is not exactly zero"),
        ({"activation_function": "gelu_new"}, "names gelu_new"),
        (
            {"text_config": {"hidden_act": "silu"}, "vision_config": {"hidden_act": "gelu"}},
            "gelu and silu",
        ),
        ({"model_type": "unknown"}, "no activation that is known"),
    ],
)
def test_other_activations_are_packed_as_usual(
    tmp_path: Path, config: dict[str, Any], said: str
) -> None:
    model = opt(tmp_path / "model", config=config)
    report = pack_checkpoint(model, tmp_path / "packed", neurons=True)
    assert said in report.neurons_unused
    assert report.sizes.neuron_tensors == 0
    pack_checkpoint(model, tmp_path / "plain")
    for file in (tmp_path / "plain").glob("*.*"):
        assert file.read_bytes() == (tmp_path / "packed" / file.name).read_bytes(), file.name


@pytest.mark.parametrize(
    ("first", "second", "config", "found"),
    [
        ("mlp.up_proj", "mlp.down_proj", {"hidden_act": "relu2"}, True),
        ("mlp.gate_proj", "mlp.down_proj", {"text_config": {"hidden_act": "relu"}}, True),
        (
            "mlp.dense_h_to_4h",
            "mlp.dense_4h_to_h",
            {"hidden_act": "relu2", "hidden_size": 64},
            True,
        ),
        ("layer.1.DenseReluDense.wi", "layer.1.DenseReluDense.wo", {"dense_act_fn": "relu"}, True),
        ("mlp.experts.0.up_proj", "mlp.experts.0.down_proj", {"hidden_act": "relu"}, False),
        ("mlp.c_fc", "mlp.c_proj", {"activation_function": "relu", "hidden_size": 192}, False),
        ("mlp.fc1", "attn.fc2", {"hidden_act": "relu"}, False),
    ],
)
def test_names_of_second_matrices(
    tmp_path: Path, first: str, second: str, config: dict[str, Any], found: bool
) -> None:
    state = {
        f"model.layers.0.{first}.weight": finite(192, 64, seed=1),
        f"model.layers.0.{second}.weight": finite(64, 192, seed=2),
    }
    with closing(open_source(opt(tmp_path / "model", state, config))) as source:
        neurons = find_neurons(source, frozenset(state))
    assert neurons.matrices == ({f"model.layers.0.{second}.weight"} if found else frozenset())
    assert bool(neurons.unused) != found


def test_refusals(tmp_path: Path) -> None:
    from endor.quantization import QuantizeOptions

    state = opt_state()
    model = opt(tmp_path / "model", state)
    with pytest.raises(ConfigError, match="no integers"):
        pack_checkpoint(model, tmp_path / "out", neurons=True, quantize=QuantizeOptions(bits=4))
    with pytest.raises(ConfigError, match="no integers"):
        pack_checkpoint(model, tmp_path / "out", neurons=True, codec="dense")
    with pytest.raises(ConfigError, match=r"needs a config\.json"):
        pack_checkpoint(model / "model.safetensors", tmp_path / "out", neurons=True)
    state["model.decoder.layers.1.fc2.weight"][3, 5] = float("inf")
    with pytest.raises(CheckpointError, match=r"layers\.1\.fc2\.weight: holds NaN or infinities"):
        pack_checkpoint(opt(tmp_path / "bad", state), tmp_path / "out", neurons=True)
    assert not (tmp_path / "out").exists()


def test_what_is_stored_dense_is_not_turned(tmp_path: Path) -> None:
    """Elements of no pattern at all, which no codec makes smaller."""
    noise = np.random.default_rng(0).integers(1, 255, (64, 192, 2)).astype(np.uint8)
    noise[..., 1] &= 0x5B
    state = opt_state(torch.float16)
    name = "model.decoder.layers.0.fc2.weight"
    state[name] = torch.from_numpy(noise).view(torch.float16).reshape(64, 192)
    pack_checkpoint(opt(tmp_path / "model", state), tmp_path / "packed", neurons=True)
    rows = {row.name: row.spec for row in inspect_checkpoint(tmp_path / "packed").rows}
    assert rows[name].transposed == (rows[name].codec != "dense")
    assert verify_checkpoint(tmp_path / "packed", against=tmp_path / "model").problems == ()


def test_the_names_are_functions_that_are_exactly_zero() -> None:
    activations = pytest.importorskip("transformers.activations").ACT2FN
    x = -torch.logspace(-30, 30, 200)
    known = [name for name in sorted(ZERO_ACTIVATIONS) if name in activations]
    assert {"relu", "relu2", "relu6"} <= set(known)
    for name in known:
        assert not activations[name](x).any(), name
    for name in ("gelu", "silu", "gelu_new", "quick_gelu", "leaky_relu", "mish"):
        assert name not in ZERO_ACTIVATIONS
    assert len(set(ACTIVATION_KEYS)) == len(ACTIVATION_KEYS)
