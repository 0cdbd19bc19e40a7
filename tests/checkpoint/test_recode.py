"""Checkpoints that are quantised already: packed smaller, unpacked to the same bytes."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

import endor
from endor.checkpoint import inspect_checkpoint, unpack_checkpoint, verify_checkpoint
from endor.checkpoint.recode import recodable
from endor.cli.main import cli
from endor.errors import ConfigError, EndorError, PruningError
from endor.packing import pack_checkpoint

ROWS, COLS = 256, 512
PREFIX = "model.layers.{}.mlp.up_proj."
State = dict[str, torch.Tensor]


def weight(layer: int) -> torch.Tensor:
    return torch.randn(ROWS, COLS, generator=torch.Generator().manual_seed(layer))


def integers(values: torch.Tensor, group: int, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return symmetric codes, and scales, one for `group` columns of a row."""
    part, top = values.reshape(ROWS, -1, group), 2 ** (bits - 1) - 1
    scale = part.abs().amax(2, keepdim=True) / (top + 0.5)
    codes = (part / scale).round().clamp(-top - 1, top).reshape(ROWS, COLS).int()
    return codes, scale.reshape(ROWS, -1).half()


def words(codes: torch.Tensor, bits: int, order: list[int] | None = None) -> torch.Tensor:
    """Return unsigned codes packed along the last dimension into int32."""
    count = 32 // bits
    parts = codes.reshape(*codes.shape[:-1], -1, count).long()[..., order or list(range(count))]
    joined = (parts << bits * torch.arange(count)).sum(-1)
    return torch.where(joined >= 1 << 31, joined - (1 << 32), joined).int()


def gptq(layer: int) -> State:
    codes, scales = integers(weight(layer), 128, 4)
    return {
        "qweight": words(codes + 8, 4).T.contiguous(),
        "qzeros": torch.full((COLS // 128, ROWS // 8), 0x77777777, dtype=torch.int32),
        "scales": scales.T.contiguous(),
        "g_idx": (torch.arange(COLS) // 128).int(),
    }


def awq(layer: int) -> State:
    codes, scales = integers(weight(layer), 128, 4)
    return {
        "qweight": words((codes + 8).T, 4, [0, 2, 4, 6, 1, 3, 5, 7]),
        "qzeros": torch.full((COLS // 128, ROWS // 8), -0x77777778, dtype=torch.int32),
        "scales": scales.T.contiguous(),
    }


def packed(bits: int) -> Callable[[int], State]:
    def make(layer: int) -> State:
        codes, scales = integers(weight(layer), 128, bits)
        return {
            "weight_packed": words(codes + 2 ** (bits - 1), bits),
            "weight_scale": scales.bfloat16(),
            "weight_shape": torch.tensor([ROWS, COLS]),
        }

    return make


def int8(layer: int) -> State:
    codes, scales = integers(weight(layer), COLS, 8)
    return {"weight": codes.to(torch.int8), "weight_scale": scales.float()}


def bitsandbytes_int8(layer: int) -> State:
    codes, scales = integers(weight(layer), COLS, 8)
    return {
        "weight": codes.to(torch.int8),
        "SCB": scales.float().reshape(-1),
        "weight_format": torch.tensor(0, dtype=torch.uint8),
    }


def fp8(rows: int, cols: int, dtype: torch.dtype = torch.float8_e4m3fn) -> Callable[[int], State]:
    def make(layer: int) -> State:
        blocks = weight(layer).reshape(ROWS // rows, rows, COLS // cols, cols)
        scale = blocks.abs().amax((1, 3), keepdim=True) / torch.finfo(dtype).max
        codes = (blocks / scale).reshape(ROWS, COLS).to(dtype)
        return {"weight": codes, "weight_scale_inv": scale.reshape(ROWS // rows, -1)}

    return make


def nf4(layer: int) -> State:
    part = weight(layer).reshape(-1, 64)
    scale = part.abs().amax(1)
    levels = torch.linspace(-1, 1, 16)
    codes = torch.bucketize(part / scale[:, None], (levels[1:] + levels[:-1]) / 2).to(torch.uint8)
    codes = codes.reshape(-1, 2)
    state = json.dumps({"quant_type": "nf4", "blocksize": 64, "shape": [ROWS, COLS]}).encode()
    return {
        "weight": (codes[:, :1] << 4 | codes[:, 1:]).contiguous(),
        "weight.absmax": (scale * 40).to(torch.uint8),
        "weight.quant_map": levels,
        "weight.quant_state.bitsandbytes__nf4": torch.frombuffer(
            bytearray(state), dtype=torch.uint8
        ),
    }


def mxfp4(layer: int) -> State:
    part = weight(layer).reshape(-1, 32)
    scale = part.abs().amax(1, keepdim=True).log2().floor() - 2
    levels = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    codes = torch.bucketize((part / 2**scale).abs(), (levels[1:] + levels[:-1]) / 2)
    codes = (codes + 8 * torch.signbit(part)).to(torch.uint8).reshape(-1, 2)
    return {
        "weight_blocks": (codes[:, 0] | codes[:, 1] << 4).reshape(2, ROWS // 2, COLS // 32, 16),
        "weight_scales": (scale + 127).to(torch.uint8).reshape(2, ROWS // 2, COLS // 32),
    }


FORMATS: dict[str, tuple[Callable[[int], State], float]] = {
    "gptq": (gptq, 3.75 / 4),
    "awq": (awq, 3.75 / 4),
    "compressed-tensors int4": (packed(4), 3.75 / 4),
    "compressed-tensors int8": (packed(8), 7.6 / 8),
    "compressed-tensors naive int8": (int8, 7.6 / 8),
    "bitsandbytes int8": (bitsandbytes_int8, 7.6 / 8),
    "fp8 tensor": (fp8(ROWS, COLS), 7.2 / 8),
    "fp8 row": (fp8(1, COLS), 7.2 / 8),
    "fp8 block": (fp8(128, 128), 7.2 / 8),
    "fp8 e5m2": (fp8(1, COLS, torch.float8_e5m2), 7.2 / 8),
    "nf4": (nf4, 0.99),
    "mxfp4": (mxfp4, 1.0),
}


def checkpoint(folder: Path, make: Callable[[int], State], config: dict[str, Any]) -> Path:
    folder.mkdir()
    state = {
        PREFIX.format(layer) + key: value.clone()
        for layer in range(2)
        for key, value in make(layer).items()
    }
    state["model.norm.weight"] = torch.ones(COLS, dtype=torch.bfloat16)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    return folder


QUANTIZED = {"model_type": "llama", "quantization_config": {"quant_method": "some", "bits": 4}}


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1).view(torch.uint8) if tensor.dim() else tensor.reshape(1)


@pytest.mark.parametrize("name", FORMATS)
def test_codes_come_back_bit_for_bit_and_take_less(tmp_path: Path, name: str) -> None:
    make, most = FORMATS[name]
    model = checkpoint(tmp_path / "model", make, QUANTIZED)
    report = pack_checkpoint(model, tmp_path / "packed")
    sizes = report.sizes
    assert sizes.recoded_tensors >= 2
    assert sizes.recoded_bytes < most * sizes.recoded_from_bytes
    assert not verify_checkpoint(tmp_path / "packed", against=model).problems
    unpack_checkpoint(tmp_path / "packed", tmp_path / "again")
    for file in ("model.safetensors", "config.json"):
        before, after = (tmp_path / place / file for place in ("model", "again"))
        if file == "config.json":
            assert json.loads(after.read_text()) == json.loads(before.read_text())
        else:
            assert after.read_bytes() == before.read_bytes()
    source, again = load_file(model / "model.safetensors"), tmp_path / "again/model.safetensors"
    for key, value in load_file(again).items():
        assert value.dtype == source[key].dtype
        assert torch.equal(bits(value), bits(source[key])), key


def test_a_lone_file_is_recoded_and_read(tmp_path: Path) -> None:
    make, most = FORMATS["fp8 row"]
    model = checkpoint(tmp_path / "model", make, QUANTIZED) / "model.safetensors"
    report = pack_checkpoint(model, tmp_path / "out.safetensors")
    assert report.sizes.recoded_bytes < most * report.sizes.recoded_from_bytes
    wanted = load_file(model)
    for key, value in endor.load_file(tmp_path / "out.safetensors").items():
        assert torch.equal(bits(value), bits(wanted[key])), key


def test_what_gains_nothing_stays_and_pack_says_so(tmp_path: Path) -> None:
    def noise(layer: int) -> State:
        made = gptq(layer)
        raw = np.random.default_rng(layer).integers(-(2**31), 2**31, (64, 256)).astype(np.int32)
        return {"qweight": torch.from_numpy(raw), "other": made["qweight"]}

    model = checkpoint(tmp_path / "model", noise, QUANTIZED)
    result = CliRunner().invoke(cli, ["pack", str(model), str(tmp_path / "packed")])
    assert result.exit_code == 0, result.output
    assert "2 of 4 tensors of packed codes re-coded" in result.output
    assert "2 would gain nothing and stay as they are" in result.output
    codecs = {row.name: row.spec.codec for row in inspect_checkpoint(tmp_path / "packed").rows}
    assert codecs[PREFIX.format(0) + "qweight"] == "dense"
    assert codecs[PREFIX.format(0) + "other"] == "fields"
    result = CliRunner().invoke(cli, ["inspect", str(tmp_path / "packed")])
    assert "fields of 8 bits" in result.output or "fields of 4 bits" in result.output


def test_integers_of_models_that_are_not_quantised_are_left_alone(tmp_path: Path) -> None:
    model = checkpoint(tmp_path / "model", gptq, {"model_type": "llama"})
    assert pack_checkpoint(model, tmp_path / "packed").sizes.recoded_tensors == 0


@pytest.mark.parametrize(
    "options", [{"exclude": ["*.qweight"]}, {"codec": "dense"}, {"codec": "raw"}]
)
def test_what_is_excluded_or_forced_is_not_recoded(tmp_path: Path, options: dict[str, Any]) -> None:
    model = checkpoint(tmp_path / "model", gptq, QUANTIZED)
    assert pack_checkpoint(model, tmp_path / "packed", **options).sizes.recoded_tensors == 0
    assert not verify_checkpoint(tmp_path / "packed", against=model).problems


def test_packed_again_and_packed_in_shards_are_the_same(tmp_path: Path) -> None:
    model = checkpoint(tmp_path / "model", gptq, QUANTIZED)
    pack_checkpoint(model, tmp_path / "one")
    pack_checkpoint(tmp_path / "one", tmp_path / "two", threads=1)
    for path in (tmp_path / "one").glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()


def test_a_name_that_an_array_needs_is_refused(tmp_path: Path) -> None:
    def make(layer: int) -> State:
        made = gptq(layer)
        return made | {"qweight_words": made["g_idx"].clone()}

    model = checkpoint(tmp_path / "model", make, QUANTIZED)
    with pytest.raises(EndorError, match="collides with an array of the packed"):
        pack_checkpoint(model, tmp_path / "packed")
    assert not list(tmp_path.glob("packed*"))


def test_damage_is_found(tmp_path: Path) -> None:
    model = checkpoint(tmp_path / "model", gptq, QUANTIZED)
    pack_checkpoint(model, tmp_path / "packed")
    (shard,) = (tmp_path / "packed").glob("endor-*.safetensors")
    raw = bytearray(shard.read_bytes())
    raw[len(raw) // 2] ^= 16
    shard.write_bytes(raw)
    assert verify_checkpoint(tmp_path / "packed").problems
    with pytest.raises(EndorError):
        unpack_checkpoint(tmp_path / "packed", tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_loading_says_to_unpack(tmp_path: Path) -> None:
    model = checkpoint(tmp_path / "model", gptq, QUANTIZED)
    pack_checkpoint(model, tmp_path / "packed")
    with pytest.raises(ConfigError, match="unpack"):
        endor.load_model(tmp_path / "packed", device="cpu")


def test_quantised_weights_are_not_pruned(tmp_path: Path) -> None:
    model = checkpoint(tmp_path / "model", int8, QUANTIZED)
    with pytest.raises(PruningError, match="quantized"):
        pack_checkpoint(model, tmp_path / "packed", prune="magnitude")


def test_small_tensors_are_not_looked_at(tmp_path: Path) -> None:
    model = checkpoint(tmp_path / "model", gptq, QUANTIZED)
    from contextlib import closing

    from endor.checkpoint import open_source

    with closing(open_source(model)) as source:
        assert {name.rsplit(".", 1)[1] for name in recodable(source)} == {"qweight"}
