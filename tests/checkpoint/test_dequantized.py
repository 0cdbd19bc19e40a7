"""Checkpoints of other quantised formats, packed so that they run: codes kept, values exact."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from endor.checkpoint import inspect_checkpoint, unpack_checkpoint, verify_checkpoint
from endor.cli.main import cli
from endor.errors import CheckpointError, ConfigError, EndorError
from endor.formats.contract import minifloat_levels, unpack_symbols
from endor.packing import pack_checkpoint, prune_checkpoint
from endor.quantization import QuantizeOptions

from .test_recode import (
    COLS,
    FORMATS,
    PREFIX,
    ROWS,
    State,
    bits,
    checkpoint,
    fp8,
    integers,
    weight,
    words,
)

Dense = Callable[[State], torch.Tensor]
BF16, F16 = torch.bfloat16, torch.float16


def nibbles(packed: torch.Tensor) -> torch.Tensor:
    """Codes of 4 bits along the last dimension, the lowest first."""
    shifts = 4 * torch.arange(8)
    return (packed.long()[..., None] >> shifts & 15).flatten(-2)


def of_gptq(state: State) -> torch.Tensor:
    codes = nibbles(state["qweight"].T)
    zeros = nibbles(state["qzeros"]).T + 1 & 15
    groups = state["g_idx"].long()
    return ((codes - zeros[:, groups]).float() * state["scales"].T.float()[:, groups]).to(BF16)


def of_awq(state: State) -> torch.Tensor:
    places = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7]).argsort()

    def ordered(packed: torch.Tensor) -> torch.Tensor:
        return nibbles(packed).unflatten(-1, (-1, 8))[..., places].flatten(-2)

    codes, zeros = ordered(state["qweight"]).T, ordered(state["qzeros"]).T
    group = codes.shape[1] // zeros.shape[1]
    scale = state["scales"].T.float().repeat_interleave(group, 1)
    return ((codes - zeros.repeat_interleave(group, 1)).float() * scale).to(BF16)


def of_words(bits_each: int) -> Dense:
    def dense(state: State) -> torch.Tensor:
        shifts = bits_each * torch.arange(32 // bits_each)
        unsigned = state["weight_packed"].long()[..., None] >> shifts & 2**bits_each - 1
        codes = unsigned.flatten(-2)[:, :COLS] - 2 ** (bits_each - 1)
        scale = state["weight_scale"].float().repeat_interleave(128, 1)
        return (codes.float() * scale).to(BF16)

    return dense


def of_scale(state: State) -> torch.Tensor:
    scale = state["weight_scale" if "weight_scale" in state else "weight_scale_inv"].float()
    rows, cols = (size // count for size, count in zip((ROWS, COLS), scale.shape, strict=True))
    spread = scale.repeat_interleave(rows, 0).repeat_interleave(cols, 1)
    return (state["weight"].float() * spread).to(BF16)


def of_scb(state: State) -> torch.Tensor:
    scale = state["SCB"][:, None] * torch.tensor(1 / 127)
    return (state["weight"].float() * scale).to(BF16)


def of_nf4(state: State) -> torch.Tensor:
    raw = state["weight"]
    codes = torch.cat([raw >> 4, raw & 15], 1).reshape(-1, 64).long()
    values = state["weight.quant_map"][codes] * state["weight.absmax"].float()[:, None]
    return values.reshape(ROWS, COLS).to(BF16)


def of_mxfp4(state: State) -> torch.Tensor:
    raw = state["weight_blocks"]
    codes = torch.stack([raw & 15, raw >> 4], -1).flatten(-2).long()
    half = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    values = torch.cat([half, -half])[codes]
    values = torch.ldexp(values, state["weight_scales"][..., None].int() - 127)
    return values.reshape(2, ROWS // 2, COLS).transpose(1, 2).contiguous().to(BF16)


DENSE: dict[str, Dense] = {
    "gptq": of_gptq,
    "awq": of_awq,
    "compressed-tensors int4": of_words(4),
    "compressed-tensors int8": of_words(8),
    "compressed-tensors naive int8": of_scale,
    "bitsandbytes int8": of_scb,
    "fp8 tensor": of_scale,
    "fp8 row": of_scale,
    "fp8 block": of_scale,
    "fp8 e5m2": of_scale,
    "nf4": of_nf4,
    "mxfp4": of_mxfp4,
}


def config(name: str, **more: Any) -> dict[str, Any]:
    method = "awq" if name == "awq" else "gptq" if name == "gptq" else "some"
    width = 8 if "int8" in name else 4
    return {
        "model_type": "llama",
        "torch_dtype": "bfloat16",
        "quantization_config": {"quant_method": method, "bits": width, **more},
    }


def unpacked(packed: Path, out: Path) -> Mapping[str, torch.Tensor]:
    unpack_checkpoint(packed, out)
    return load_file(out / "model.safetensors")


@pytest.mark.parametrize("name", FORMATS)
def test_values_are_those_of_the_format(tmp_path: Path, name: str) -> None:
    assert DENSE.keys() == FORMATS.keys()
    make, _ = FORMATS[name]
    model = checkpoint(tmp_path / "model", make, config(name))
    report = pack_checkpoint(model, tmp_path / "packed", dequantize=True)
    assert not report.stored_quantization
    rows = {row.name: row.spec for row in inspect_checkpoint(tmp_path / "packed").rows}
    key = PREFIX.format(0) + "weight"
    assert rows[key].codec == "int"
    found = unpacked(tmp_path / "packed", tmp_path / "dense")
    for layer in range(2):
        wanted = DENSE[name](make(layer))
        value = found[PREFIX.format(layer) + "weight"]
        assert value.dtype == wanted.dtype
        assert torch.equal(bits(value), bits(wanted)), name
    names = {PREFIX.format(layer) + "weight" for layer in range(2)}
    assert set(found) == names | {"model.norm.weight"}
    assert "quantization_config" not in json.loads((tmp_path / "dense/config.json").read_text())
    outcome = verify_checkpoint(tmp_path / "packed", against=model)
    assert not outcome.problems
    assert not outcome.lossy


@pytest.mark.parametrize("width", [2, 3, 4, 8])
@pytest.mark.parametrize("version", ["gptq", "gptq_v2"])
def test_gptq_of_every_width_with_zero_points_and_odd_groups(
    tmp_path: Path, width: int, version: str
) -> None:
    generator = torch.Generator().manual_seed(width)
    top = 2**width - 1
    codes = torch.randint(0, top + 1, (ROWS, COLS), generator=generator)
    zeros = torch.randint(0, top + 1, (COLS // 64, ROWS), generator=generator)
    scales = (torch.rand(COLS // 64, ROWS, generator=generator) / 100).half()

    def stream(values: torch.Tensor) -> torch.Tensor:
        """Codes of each row as one stream of bits in words."""
        flat = (values[..., None] >> torch.arange(width) & 1).flatten(-2).numpy().astype(np.uint8)
        raw = np.packbits(flat, axis=1, bitorder="little")
        return torch.from_numpy(np.ascontiguousarray(raw).view(np.int32))

    stored = zeros if version == "gptq_v2" else zeros - 1 & top

    def make(_: int) -> State:
        return {
            "qweight": stream(codes).T.contiguous(),
            "qzeros": stream(stored),
            "scales": scales,
            "g_idx": (torch.arange(COLS) // 64).int(),
        }

    about = config("gptq", checkpoint_format=version, group_size=64)
    about["quantization_config"]["bits"] = width
    about["torch_dtype"] = "float16"
    model = checkpoint(tmp_path / "model", make, about)
    pack_checkpoint(model, tmp_path / "packed", dequantize=True)
    found = unpacked(tmp_path / "packed", tmp_path / "dense")[PREFIX.format(0) + "weight"]
    spread = zeros.T.repeat_interleave(64, 1), scales.T.float().repeat_interleave(64, 1)
    wanted = ((codes - spread[0]).float() * spread[1]).half()
    assert torch.equal(bits(found), bits(wanted))


def test_act_order_is_exact_in_the_codecs_of_dense_weights(tmp_path: Path) -> None:
    order = torch.randperm(COLS, generator=torch.Generator().manual_seed(1))

    def make(layer: int) -> State:
        state = FORMATS["gptq"][0](layer)
        return state | {"g_idx": (order // 128).int()}

    model = checkpoint(tmp_path / "model", make, config("gptq", desc_act=True))
    pack_checkpoint(model, tmp_path / "packed", dequantize=True)
    key = PREFIX.format(0) + "weight"
    rows = {row.name: row.spec for row in inspect_checkpoint(tmp_path / "packed").rows}
    assert rows[key].codec != "int"
    found = unpacked(tmp_path / "packed", tmp_path / "dense")[key]
    assert torch.equal(bits(found), bits(of_gptq(make(0))))


def test_asymmetric_groups_of_compressed_tensors(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(5)
    codes = torch.randint(-8, 8, (ROWS, COLS), generator=generator)
    zeros = torch.randint(-8, 8, (ROWS, COLS // 128), generator=generator)
    scale = torch.rand(ROWS, COLS // 128, generator=generator).to(BF16)

    def make(_: int) -> State:
        return {
            "weight_packed": words(codes + 8, 4),
            "weight_zero_point": words((zeros + 8).T.contiguous(), 4).T.contiguous(),
            "weight_scale": scale,
            "weight_shape": torch.tensor([ROWS, COLS]),
        }

    groups = {"config_groups": {"group_0": {"weights": {"num_bits": 4, "symmetric": False}}}}
    about = config("ct", **groups)
    del about["quantization_config"]["bits"]
    model = checkpoint(tmp_path / "model", make, about)
    pack_checkpoint(model, tmp_path / "packed", dequantize=True)
    found = unpacked(tmp_path / "packed", tmp_path / "dense")[PREFIX.format(0) + "weight"]
    spread = (values.repeat_interleave(128, 1) for values in (zeros, scale.float()))
    wanted = ((codes - next(spread)).float() * next(spread)).to(BF16)
    assert torch.equal(bits(found), bits(wanted))


def test_blocks_that_do_not_divide_the_matrix(tmp_path: Path) -> None:
    """DeepSeek's 576 rows in blocks of 128."""
    values = torch.randn(200, 300, generator=torch.Generator().manual_seed(2))
    scale = torch.rand(2, 3) / 100 + 0.01

    def make(_: int) -> State:
        return {"weight": values.to(torch.float8_e4m3fn), "weight_scale_inv": scale}

    about = config("fp8", weight_block_size=[128, 128])
    model = checkpoint(tmp_path / "model", make, about)
    pack_checkpoint(model, tmp_path / "packed", dequantize=True)
    found = unpacked(tmp_path / "packed", tmp_path / "dense")[PREFIX.format(0) + "weight"]
    spread = scale.repeat_interleave(128, 0)[:200].repeat_interleave(128, 1)[:, :300]
    wanted = (values.to(torch.float8_e4m3fn).float() * spread).to(BF16)
    assert torch.equal(bits(found), bits(wanted))


def test_nested_scales_of_bitsandbytes(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(3)
    raw = torch.randint(0, 256, (ROWS * COLS // 2, 1), generator=generator, dtype=torch.uint8)
    blocks = ROWS * COLS // 64
    table = torch.rand(256, generator=generator) * 2 - 1
    inner = torch.randint(0, 256, (blocks,), generator=generator, dtype=torch.uint8)
    outer = torch.rand(-(-blocks // 256), generator=generator)
    levels = torch.linspace(-1, 1, 16)
    state = {"blocksize": 64, "shape": [ROWS, COLS], "dtype": "float16"}
    state |= {"nested_blocksize": 256, "nested_offset": 0.25, "quant_type": "nf4"}

    def make(_: int) -> State:
        return {
            "weight": raw,
            "weight.absmax": inner,
            "weight.quant_map": levels,
            "weight.nested_absmax": outer,
            "weight.nested_quant_map": table,
            "weight.quant_state.bitsandbytes__nf4": torch.frombuffer(
                bytearray(json.dumps(state).encode()), dtype=torch.uint8
            ),
        }

    model = checkpoint(tmp_path / "model", make, config("bnb"))
    pack_checkpoint(model, tmp_path / "packed", dequantize=True)
    found = unpacked(tmp_path / "packed", tmp_path / "dense")[PREFIX.format(0) + "weight"]
    absmax = table[inner.long()] * outer.repeat_interleave(256)[:blocks] + 0.25
    codes = torch.cat([raw >> 4, raw & 15], 1).reshape(-1, 64).long()
    wanted = (levels[codes] * absmax[:, None]).reshape(ROWS, COLS).half()
    assert torch.equal(bits(found), bits(wanted))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_levels_are_torchs(dtype: torch.dtype) -> None:
    name = {torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2"}[dtype]
    found = torch.from_numpy(minifloat_levels(name))
    wanted = torch.arange(256, dtype=torch.uint8).view(dtype).float()
    finite = wanted.isfinite()
    assert torch.equal(found[finite].view(torch.int32), wanted[finite].view(torch.int32))
    assert found[~finite].isnan().all()


@pytest.mark.parametrize("width", range(1, 9))
def test_symbols_are_a_stream_of_bits(width: int, rng: np.random.Generator) -> None:
    symbols = rng.integers(0, 1 << width, (5, 64)).astype(np.uint8)
    single = symbols[:, :, None] >> np.arange(width) & 1
    raw = np.packbits(single.reshape(5, -1).astype(np.uint8), axis=1, bitorder="little")
    assert np.array_equal(unpack_symbols(raw.view(np.int32), width, 64), symbols)
    assert np.array_equal(unpack_symbols(raw.view(np.int32), width, 61), symbols[:, :61])


def test_it_can_be_pruned_and_quantised(tmp_path: Path) -> None:
    make, _ = FORMATS["fp8 block"]
    model = checkpoint(tmp_path / "model", make, config("fp8"))
    pack_checkpoint(model, tmp_path / "pruned", prune="magnitude", dequantize=True)
    key = PREFIX.format(0) + "weight"
    found = unpacked(tmp_path / "pruned", tmp_path / "dense")[key]
    wanted = DENSE["fp8 block"](make(0))
    assert (found == 0).float().mean() == pytest.approx(0.5, abs=0.01)
    assert torch.equal(found[found != 0], wanted[found != 0])
    pack_checkpoint(
        model,
        tmp_path / "rounded",
        quantize=QuantizeOptions(bits=4),
        calibrate=False,
        dequantize=True,
    )
    found = unpacked(tmp_path / "rounded", tmp_path / "rounded-dense")[key]
    assert 0 < (found.float() - wanted.float()).square().mean() < 0.02 * wanted.float().var()
    prune_checkpoint(model, tmp_path / "dense-pruned", dequantize=True)
    assert (load_file(tmp_path / "dense-pruned/model.safetensors")[key] == 0).any()


def damaged(state: State, how: str) -> State:
    if how == "no scale":
        del state["weight_scale_inv"]
    elif how == "scales of another shape":
        state["weight_scale_inv"] = torch.ones(3, 5)
    elif how == "nan":
        state["weight"].view(torch.uint8)[5, 7] = 0x7F
    elif how == "infinite scale":
        state["weight_scale_inv"][0, 0] = torch.inf
    elif how == "tiny scale":
        state["weight_scale_inv"][0, 0] = 1e-38
    return state


@pytest.mark.parametrize(
    "how", ["no scale", "scales of another shape", "nan", "infinite scale", "tiny scale"]
)
def test_damage_is_named_and_nothing_is_left(tmp_path: Path, how: str) -> None:
    model = checkpoint(
        tmp_path / "model", lambda layer: damaged(fp8(128, 128)(layer), how), config("fp8")
    )
    with pytest.raises(EndorError, match=r"model\.layers|cannot be dequantized"):
        pack_checkpoint(model, tmp_path / "packed", dequantize=True)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("part", ["qzeros", "scales"])
def test_missing_parts_are_named(tmp_path: Path, part: str) -> None:
    def make(layer: int) -> State:
        state = FORMATS["gptq"][0](layer)
        del state[part]
        return state

    model = checkpoint(tmp_path / "model", make, config("gptq"))
    with pytest.raises(CheckpointError, match=part):
        pack_checkpoint(model, tmp_path / "packed", dequantize=True)


def test_a_scale_of_zeros_alone_may_be_tiny(tmp_path: Path) -> None:
    def make(layer: int) -> State:
        state = fp8(128, 128)(layer)
        state["weight"].view(torch.uint8)[:128, :128] = 0x80
        state["weight_scale_inv"][0, 0] = 1e-38
        return state

    model = checkpoint(tmp_path / "model", make, config("fp8"))
    pack_checkpoint(model, tmp_path / "packed", dequantize=True)
    found = unpacked(tmp_path / "packed", tmp_path / "dense")[PREFIX.format(0) + "weight"]
    assert (found[:128, :128].view(torch.int16) == -(1 << 15)).all()


def test_what_is_not_quantised_or_not_known_is_refused(tmp_path: Path) -> None:
    dense = checkpoint(tmp_path / "dense", lambda _: {"weight": weight(0)}, {"model_type": "llama"})
    with pytest.raises(ConfigError, match="leave out --dequantize"):
        pack_checkpoint(dense, tmp_path / "out", dequantize=True)
    other = checkpoint(
        tmp_path / "other", lambda _: {"codes": integers(weight(0), 128, 4)[0]}, config("some")
    )
    with pytest.raises(ConfigError, match=r"cannot be dequantized.*without --dequantize"):
        pack_checkpoint(other, tmp_path / "out", dequantize=True)
    result = CliRunner().invoke(
        cli, ["pack", str(dense), str(tmp_path / "out"), "--dequantize", "--codec", "raw"]
    )
    assert result.exit_code == 2
    assert not (tmp_path / "out").exists()


def test_scales_of_activations_are_left_out(tmp_path: Path) -> None:
    def make(layer: int) -> State:
        return fp8(ROWS, COLS)(layer) | {"input_scale": torch.tensor(0.5)}

    model = checkpoint(tmp_path / "model", make, config("fp8"))
    pack_checkpoint(model, tmp_path / "packed", dequantize=True)
    assert not [
        name
        for name in unpacked(tmp_path / "packed", tmp_path / "dense")
        if name.endswith("input_scale")
    ]


def quantized_llama(folder: Path) -> Path:
    """A tiny Llama in fp8 by blocks, its head too."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    about = LlamaConfig(
        vocab_size=128,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
        dtype="bfloat16",
    )
    model = LlamaForCausalLM(about).to(BF16)
    model.save_pretrained(folder)
    state = load_file(folder / "model.safetensors")
    out = {}
    for name, value in state.items():
        if value.dim() == 2 and "layers" in name:
            rows, cols = (size // 64 for size in value.shape)
            blocks = value.float().reshape(rows, 64, cols, 64)
            scale = blocks.abs().amax((1, 3), keepdim=True) / 448
            out[name] = (blocks / scale).reshape(value.shape).to(torch.float8_e4m3fn)
            out[name + "_scale_inv"] = scale.reshape(rows, cols)
        else:
            out[name] = value
    save_file(out, folder / "model.safetensors", metadata={"format": "pt"})
    settings = json.loads((folder / "config.json").read_text())
    settings["quantization_config"] = {
        "quant_method": "fp8",
        "weight_block_size": [64, 64],
        "activation_scheme": "dynamic",
    }
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


def test_a_model_runs_and_computes_what_transformers_dequantised_computes(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    from endor import load_model

    model = quantized_llama(tmp_path / "fp8")
    pack_checkpoint(model, tmp_path / "packed", dequantize=True)
    unpack_checkpoint(tmp_path / "packed", tmp_path / "dense")
    tokens = torch.arange(24).reshape(2, 12)
    dense = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    with torch.no_grad():
        wanted = dense(tokens).logits
        packed = load_model(tmp_path / "packed")
        assert torch.equal(packed(tokens).logits.view(torch.int16), wanted.view(torch.int16))
        theirs = transformers.AutoModelForCausalLM.from_pretrained(
            model,
            quantization_config=transformers.FineGrainedFP8Config(
                weight_block_size=(64, 64), dequantize=True
            ),
        )
        assert torch.equal(
            theirs(tokens).logits.to(BF16).view(torch.int16), wanted.view(torch.int16)
        )


def test_codes_are_not_stored_by_neuron(tmp_path: Path) -> None:
    model = checkpoint(tmp_path / "model", FORMATS["fp8 block"][0], config("fp8"))
    with pytest.raises(ConfigError, match="neurons"):
        pack_checkpoint(model, tmp_path / "packed", dequantize=True, neurons=True)


def test_mxfp4_is_transformers(tmp_path: Path) -> None:
    mxfp4 = pytest.importorskip("transformers.integrations.mxfp4")
    state = FORMATS["mxfp4"][0](0)
    theirs = mxfp4.convert_moe_packed_tensors(state["weight_blocks"], state["weight_scales"])
    assert torch.equal(bits(of_mxfp4(state)), bits(theirs.contiguous()))
