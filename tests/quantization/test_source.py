"""Whole checkpoints: every selected tensor quantised, the bits hit, runs that go on, packing."""

import json
from contextlib import closing

import numpy as np
import pytest
import torch
from click.testing import CliRunner

import endor
from endor.checkpoint import open_source, unpack_checkpoint
from endor.checkpoint.plan import plan_units
from endor.checkpoint.select import select
from endor.cli.main import cli
from endor.codecs import dtype, integer
from endor.errors import ConfigError, DTypeError, EndorError, QuantizationError
from endor.packed import tensor_of
from endor.packing import pack_checkpoint, prune_checkpoint
from endor.pruning import PruneOptions
from endor.quantization.contract import QuantizeOptions
from endor.quantization.source import QuantizedSource, RoundedSource

ARCHITECTURES = ["llama", "gpt2", "phi3", "mixtral", "qwen3_moe", "gpt_oss", "llama4"]


def small(text, method="none", **fields):
    return PruneOptions(method=method, calibration=(text,), samples=20, seq_len=32, **fields)


def read(source, name):
    tensor = source.tensors[name]
    raw = np.empty(tensor.nbytes, dtype=np.uint8)
    source.read_into(name, raw)
    return tensor_of(raw.view(tensor.dtype.uint).reshape(tensor.shape), tensor.dtype)


def run(directory, prune, options, **named):
    """Return all tensors, codes and steps of the selected ones, and the dense tensors."""
    with closing(open_source(directory)) as source:
        selected = select(source.tensors.values())
        units = plan_units(source.tensors.values(), selected)
        names = [tensor.name for unit in units for tensor in unit.tensors]
        dense = {name: read(source, name) for name in names}
        with closing(QuantizedSource(source, prune, options, selected, **named)) as found:
            tensors = {name: read(found, name) for name in names}
            coded = {name: found.coded(name) for name in names}
    return tensors, {name: one for name, one in coded.items() if one is not None}, dense


def bits_of_all(coded):
    sizes = [(it.codes.size, integer.size_bits(it.codes, it.steps)) for it in coded.values()]
    return sum(numel * bits for numel, bits in sizes) / sum(numel for numel, _ in sizes)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_selected_tensor_is_codes_times_steps(architecture, tmp_path, save, text):
    save(tmp_path, architecture, torch.bfloat16)
    tensors, coded, dense = run(tmp_path, small(text), QuantizeOptions(bits=4))
    assert len(coded) >= 3 * 4
    for name, tensor in tensors.items():
        if name not in coded:
            assert torch.equal(tensor, dense[name]), name
            continue
        codes, steps = coded[name][:2]
        assert codes.shape == tuple(tensor.shape)
        bits = integer.dense_of(codes, steps, dtype("BF16"))
        assert np.array_equal(tensor.view(torch.int16).numpy().view(np.uint16), bits), name
        change, whole = tensor.float() - dense[name].float(), dense[name].float()
        assert 0 < change.square().sum() < whole.square().sum(), name


@pytest.mark.parametrize("bits", [2.5, 4.0, 7.0])
def test_the_bits_of_all_matrices_are_hit(bits, tmp_path, save, text):
    save(tmp_path, "llama")
    _, coded, _ = run(tmp_path, small(text), QuantizeOptions(bits=bits))
    assert bits_of_all(coded) == pytest.approx(0.9 * bits, abs=0.02)  # so tiny a model: padding


def test_more_bits_are_nearer(tmp_path, save, text):
    save(tmp_path, "llama")
    name = "model.layers.1.mlp.down_proj.weight"
    errors = []
    for bits in (3, 5, 8):
        tensors, _, dense = run(tmp_path, small(text), QuantizeOptions(bits=bits))
        errors.append(float((tensors[name] - dense[name]).square().mean()))
    assert errors[0] > 4 * errors[1] > 16 * errors[2]


@pytest.mark.parametrize("method", ["wanda", "auto"])
def test_pruned_weights_stay_zero(method, tmp_path, save, text):
    save(tmp_path, "llama", torch.bfloat16)
    prune = small(text, method, sparsity=0.5)
    _, coded, dense = run(tmp_path, prune, QuantizeOptions(bits=3))
    for name, (codes, *_) in coded.items():
        zeros = np.count_nonzero(codes == 0)
        assert zeros >= int(dense[name].numel() * 0.5 + 0.5), name


def test_zeros_of_a_sparse_input_are_kept_unless_told_otherwise(tmp_path, save, text):
    save(tmp_path / "model", "llama", torch.bfloat16)
    prune_checkpoint(tmp_path / "model", tmp_path / "sparse", prune="magnitude")
    _, coded, dense = run(tmp_path / "sparse", small(text), QuantizeOptions(bits=3))
    for name, (codes, *_) in coded.items():
        assert not codes[(dense[name] == 0).numpy()].any(), name
    options = QuantizeOptions(bits=6, keep_zeros=False)
    _, coded, dense = run(tmp_path / "sparse", small(text), options)
    assert any(codes[(dense[name] == 0).numpy()].any() for name, (codes, *_) in coded.items())


def test_a_second_run_goes_on_with_the_same_bits(tmp_path, save, text):
    save(tmp_path / "model", "mixtral", torch.bfloat16)
    prune = small(text, scratch=tmp_path / "scratch")
    _, whole, _ = run(tmp_path / "model", prune, QuantizeOptions(bits=3))
    (tmp_path / "scratch" / "layer-00002.safetensors").unlink()
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "scratch").iterdir()}
    _, again, _ = run(tmp_path / "model", prune, QuantizeOptions(bits=3))
    for name, (codes, steps, *_) in whole.items():
        assert np.array_equal(codes, again[name][0]), name
        assert np.array_equal(steps, again[name][1]), name
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in stamps.items())
    _, other, _ = run(tmp_path / "model", prune, QuantizeOptions(bits=4))
    assert bits_of_all(other) > bits_of_all(whole) + 0.5


def test_without_calibration_each_tensor_is_rounded_by_itself(tmp_path, save):
    save(tmp_path, "mixtral", torch.bfloat16)
    with closing(open_source(tmp_path)) as source:
        selected = select(source.tensors.values())
        found = RoundedSource(source, QuantizeOptions(bits=5), selected)
        for name in source.tensors:
            dense, tensor = read(source, name), read(found, name)
            if name not in selected:
                assert torch.equal(dense, tensor)
                continue
            codes, steps = found.coded(name)[:2]
            assert integer.size_bits(codes, steps) == pytest.approx(4.5, abs=0.03)
            error = (tensor - dense).float().square().sum() / dense.float().square().sum()
            assert error < 0.01


def test_a_packed_model_is_its_own_unpacking(tmp_path, save, text):
    save(tmp_path / "model", "llama", torch.bfloat16)
    with closing(open_source(tmp_path / "model")) as source:
        selected = select(source.tensors.values())
        with closing(QuantizedSource(source, small(text), QuantizeOptions(), selected)) as found:
            about = found.describe_quantization()
            pack_checkpoint(found, tmp_path / "packed", quantized=about)
    section = json.loads((tmp_path / "packed" / "config.json").read_text())["quantization_config"]
    assert section["quantize"]["method"] == "ecq"
    unpack_checkpoint(tmp_path / "packed", tmp_path / "dense")
    from transformers import AutoModelForCausalLM

    ids = torch.arange(3, 35)[None]
    packed = endor.load_model(tmp_path / "packed", device="cpu")
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.bfloat16)
    with torch.no_grad():
        ours, theirs = packed(input_ids=ids).logits, dense(input_ids=ids).logits
    assert torch.equal(ours, theirs)


def test_options_are_checked():
    with pytest.raises(ConfigError, match="bits: must lie in"):
        QuantizeOptions(bits=1)
    with pytest.raises(ConfigError, match="dampening: must not be negative"):
        QuantizeOptions(dampening=-1)


def test_what_cannot_be_quantised_is_refused(tmp_path, save, text):
    save(tmp_path / "model", "llama", torch.bfloat16)
    with (
        closing(open_source(tmp_path / "model")) as source,
        pytest.raises(ConfigError, match="nothing to quantise"),
    ):
        RoundedSource(source, QuantizeOptions(), frozenset())
    from safetensors.torch import load_file, save_file

    path = tmp_path / "model" / "model.safetensors"
    tensors = load_file(path)
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name][3, 4] = float("nan")
    save_file(tensors, path, metadata={"format": "pt"})
    with closing(open_source(tmp_path / "model")) as source:
        rounded = RoundedSource(source, QuantizeOptions(), frozenset([name]))
        with pytest.raises(QuantizationError, match=f"{name}: values must be finite"):
            rounded.coded(name)
    with pytest.raises(EndorError, match="finite"):
        run(tmp_path / "model", small(text), QuantizeOptions())
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    save_file(tensors, path, metadata={"format": "pt"})
    with (
        closing(open_source(tmp_path / "model")) as source,
        pytest.raises(DTypeError, match="must be BF16, F16, F32 to be quantised"),
    ):
        RoundedSource(source, QuantizeOptions(), frozenset([name]))


def invoke(*arguments, code=0):
    result = CliRunner().invoke(cli, list(map(str, arguments)))
    assert result.exit_code == code, result.output
    return result.output if code else result.stdout


def test_the_commands_write_the_same_values(tmp_path, save, text):
    save(tmp_path / "model", "llama", torch.bfloat16)
    words = ["--bits", 4, "--calibration", text, "--samples", 8, "--seq-len", 32]
    found = json.loads(invoke("quantize", tmp_path / "model", tmp_path / "q", *words, "--json"))
    assert found["quantize"]["bits"] == 4
    assert "bits a weight" in invoke("pack", tmp_path / "model", tmp_path / "packed", *words)
    invoke("unpack", tmp_path / "packed", tmp_path / "dense")
    name = "model.safetensors"
    assert (tmp_path / "q" / name).read_bytes() == (tmp_path / "dense" / name).read_bytes()


def test_usage_of_the_commands(tmp_path, save):
    save(tmp_path / "model", "llama", torch.bfloat16)
    where = tmp_path / "model", tmp_path / "out"
    assert "4.50 bits" in invoke("quantize", *where, "--bits", 4.5, "--calibration", "none")
    where = tmp_path / "model", tmp_path / "new"
    assert "1.5<=x<=8.5" in invoke("pack", *where, "--bits", 1, code=2)
    told = invoke("pack", *where, "--calibration", "none", code=2)
    assert "does nothing without --prune METHOD or --bits" in told
    assert "--bits or --quality is needed" in invoke("quantize", *where, code=2)
    both = ("--bits", 4, "--quality", 0.1)
    assert "exclude each other" in invoke("quantize", *where, *both, code=2)
    words = ("--bits", 3, "--codec", "exp")
    assert "leave out --codec" in invoke("pack", *where, *words, code=2)
    words = ("--bits", 3, "--prune", "wanda", "--calibration", "none")
    assert "needs a calibration text" in invoke("pack", *where, *words, code=2)
    assert not (tmp_path / "new").exists()


def test_a_lone_file_becomes_a_file_of_codes(tmp_path, save):
    from safetensors.torch import load_file

    save(tmp_path / "model", "llama", torch.bfloat16)
    lone, out = tmp_path / "model" / "model.safetensors", tmp_path / "out.safetensors"
    (tmp_path / "lone.safetensors").write_bytes(lone.read_bytes())
    invoke("pack", tmp_path / "lone.safetensors", out, "--bits", 5, "--calibration", "none")
    dense, found = load_file(lone), endor.load_file(out)
    with endor.safe_open(out) as file:
        kinds = {name: file.get_packed(name).spec.codec for name in file.keys()}  # noqa: SIM118
    assert sum(kind == "int" for kind in kinds.values()) >= 3 * 4
    for name, tensor in dense.items():
        if kinds[name] == "int":
            assert (found[name] - tensor).float().square().mean() < 0.01 * tensor.float().var()
        else:
            assert torch.equal(found[name], tensor)
