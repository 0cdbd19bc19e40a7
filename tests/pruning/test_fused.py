"""Matrices that are stored in another arrangement are renewed as if each were stored by itself."""

from contextlib import closing

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import conversion_mapping, core_model_loading
from transformers.core_model_loading import Chunk, Transpose, WeightConverter

from endor.checkpoint import open_source
from endor.checkpoint.plan import plan_units
from endor.codecs import dtype, integer
from endor.errors import QuantizationError
from endor.packed import tensor_of
from endor.pruning import PruneOptions, hold_masks
from endor.pruning.source import PrunedSource
from endor.quantization import QuantizeOptions
from endor.quantization.source import QuantizedSource

if not hasattr(core_model_loading, "Split") or not hasattr(core_model_loading, "Interleave"):
    pytest.skip("this transformers has no Split or Interleave", allow_module_level=True)
from transformers.core_model_loading import Interleave, Split

ATTENTION = [f"self_attn.{name}_proj.weight" for name in "qkv"]
GATED = ["mlp.gate_proj.weight", "mlp.up_proj.weight"]


def converters(*, interleaved=True):
    """Return conversions that undo `fuse`."""
    ways = [Interleave(dim=0), Chunk(dim=0)] if interleaved else [Chunk(dim=0)]
    return [
        WeightConverter("self_attn.qkv_proj.weight", ATTENTION, operations=[Split(dim=0)]),
        WeightConverter("mlp.w13_proj.weight", GATED, operations=ways),
        WeightConverter("mlp.w2_proj.weight", "mlp.down_proj.weight", operations=[Transpose(0, 1)]),
    ]


def fuse(tensors, *, interleaved=True):
    """Return a llama's tensors, q, k and v as one, gate and up as one, down transposed."""
    out = dict(tensors)
    for layer in range(3):
        at = f"model.layers.{layer}."
        q, k, v = (out.pop(at + name) for name in ATTENTION)
        gate, up = (out.pop(at + name) for name in GATED)
        out[at + "self_attn.qkv_proj.weight"] = torch.cat([q, k, v])
        both = torch.stack([gate, up], dim=1 if interleaved else 0)
        out[at + "mlp.w13_proj.weight"] = both.reshape(-1, gate.shape[1])
        out[at + "mlp.w2_proj.weight"] = out.pop(at + "mlp.down_proj.weight").T.contiguous()
    return out


@pytest.fixture
def pair(tmp_path, save, monkeypatch):
    """Save one model twice: as it is, and fused; conversions apply to the fused one."""
    original = conversion_mapping.get_model_conversion_mapping

    def make(kind=torch.float32, *, interleaved=True):
        plain, fused = tmp_path / "plain", tmp_path / "fused"
        save(plain, "llama", kind)
        save(fused, "llama", kind)
        tensors = fuse(load_file(plain / "model.safetensors"), interleaved=interleaved)
        save_file(tensors, fused / "model.safetensors", metadata={"format": "pt"})

        def mapping(model, *rest, **named):
            return [*original(model, *rest, **named), *converters(interleaved=interleaved)]

        monkeypatch.setattr(conversion_mapping, "get_model_conversion_mapping", mapping)
        return plain, fused

    return make


def small(text, **fields):
    return PruneOptions(calibration=(text,), samples=20, seq_len=32, **fields)


def read(source, name):
    tensor = source.tensors[name]
    raw = np.empty(tensor.nbytes, dtype=np.uint8)
    source.read_into(name, raw)
    return tensor_of(raw.view(tensor.dtype.uint).reshape(tensor.shape), tensor.dtype).clone()


def renewed(directory, wrap):
    """Return all tensors behind `wrap(source, selected)`, and the codes of those that have any."""
    with closing(open_source(directory)) as source:
        selected = frozenset(name for name in source.tensors if name.endswith("_proj.weight"))
        units = plan_units(source.tensors.values(), selected)
        names = [tensor.name for unit in units for tensor in unit.tensors]
        with closing(wrap(source, selected)) as found:
            coded = getattr(found, "coded", lambda name: None)
            return {name: read(found, name) for name in names}, {n: coded(n) for n in names}


@pytest.mark.parametrize("method", ["wanda", "sparsegpt", "alps"])
def test_pruned_as_if_each_were_stored_by_itself(pair, text, method):
    plain, fused = pair()
    wanted, found = (
        renewed(path, lambda source, names: PrunedSource(source, small(text, method=method), names))
        for path in (plain, fused)
    )
    again = fuse(wanted[0])
    assert again.keys() == found[0].keys()
    for name, tensor in again.items():
        assert torch.equal(found[0][name].view(torch.int32), tensor.view(torch.int32)), name
    zeros = [float((tensor == 0).float().mean()) for tensor in found[0].values()]
    assert sum(share > 0.4 for share in zeros) == 4 * 3


def quantized(text):
    def wrap(source, names):
        prune = small(text, method="none")
        return QuantizedSource(source, prune, QuantizeOptions(bits=4), names)

    return wrap


def test_codes_and_steps_of_what_is_split_evenly(pair, text):
    _, fused = pair(torch.bfloat16, interleaved=False)
    dense = load_file(fused / "model.safetensors")

    def wrap(source, names):
        names = frozenset(name for name in names if "qkv" not in name)
        return quantized(text)(source, names)

    tensors, coded = renewed(fused, wrap)
    coded = {name: one for name, one in coded.items() if one is not None}
    assert len(coded) == 3 * 3
    for name, (codes, steps, *_) in coded.items():
        shape = tuple(dense[name].shape)
        assert codes.shape == shape
        assert steps.shape == (
            (2, shape[1]) if "w13" in name else (shape[0], 1) if "w2" in name else (1, shape[1])
        )
        bits = integer.dense_of(codes, steps, dtype("BF16"))
        assert np.array_equal(tensors[name].view(torch.int16).numpy().view(np.uint16), bits), name
        change = tensors[name].float() - dense[name].float()
        assert 0 < change.square().sum() < 0.2 * dense[name].float().square().sum(), name


@pytest.mark.parametrize(
    ("interleaved", "left_out", "reason"),
    [(True, "qkv", "by turns"), (False, "w13", "of unequal size")],
)
def test_codes_whose_steps_would_take_too_much(
    pair, text, interleaved, left_out, reason, monkeypatch
):
    _, fused = pair(torch.bfloat16, interleaved=interleaved)
    monkeypatch.setattr("endor.pruning.skeleton.Skeleton.trace", lambda *_: pytest.fail("began"))

    def wrap(source, names):
        names = frozenset(name for name in names if left_out not in name)
        return quantized(text)(source, names)

    with pytest.raises(QuantizationError, match=reason):
        renewed(fused, wrap)


def test_masks_are_held_where_the_rows_are(pair, save, tmp_path):
    _, fused = pair()
    model = save(tmp_path / "again", "llama")
    generator = torch.Generator().manual_seed(5)
    masks = {
        name: torch.rand(tensor.shape, generator=generator) < 0.5
        for name, tensor in load_file(fused / "model.safetensors").items()
        if "_proj" in name and "o_proj" not in name
    }
    with hold_masks(model, masks):
        found = {name: value.detach() != 0 for name, value in model.named_parameters()}
    again = fuse(found)
    for name, mask in masks.items():
        assert torch.equal(again[name], mask), name
