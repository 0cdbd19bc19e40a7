import json
from contextlib import closing

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from endor.checkpoint import open_source, unpack_checkpoint, verify_checkpoint
from endor.errors import CheckpointError
from endor.packing import pack_checkpoint

from ..conftest import CONFIG, assert_same_tensors, weight, write_companions

NAME = "model.layers.0.mlp.up_proj.weight"


def compressed(name, dense):
    """Return the tensors that compressed-tensors 0.14 stores for a sparse-bitmask weight."""
    mask = dense != 0
    rows = mask.reshape(-1, dense.shape[-1])
    counts = rows.sum(1)
    packed = np.packbits(rows.numpy(), axis=1, bitorder="little")
    return {
        f"{name}.shape": torch.tensor(dense.shape),
        f"{name}.compressed": dense[mask],
        f"{name}.bitmask": torch.from_numpy(packed),
        f"{name}.row_offsets": torch.cumsum(counts, 0) - counts,
    }


def sparse(*shape, dtype=torch.bfloat16):
    out = weight(*shape, dtype=dtype).float()
    out[out == 0] = 0.0  # that format loses -0.0
    return out.to(dtype)


@pytest.fixture
def sparse_state():
    return {
        NAME: sparse(100, 67),
        "model.layers.0.mlp.down_proj.weight": sparse(64, 128, dtype=torch.float32),
        "model.layers.0.mlp.gate_proj.weight": sparse(64, 72, dtype=torch.float8_e4m3fn),
        "model.norm.weight": weight(64),
    }


@pytest.fixture
def bitmask_model(tmp_path, sparse_state):
    path = tmp_path / "sparse"
    path.mkdir()
    quantization = {"quant_method": "compressed-tensors", "config_groups": {}}
    quantization["sparsity_config"] = {"format": "sparse-bitmask", "targets": ["Linear"]}
    write_companions(path, CONFIG | {"quantization_config": quantization})
    stored = {}
    for name, tensor in sparse_state.items():
        stored |= compressed(name, tensor) if "proj" in name else {name: tensor}
    save_file(stored, path / "model.safetensors")
    return path


def test_is_read_as_dense(bitmask_model, sparse_state):
    with closing(open_source(bitmask_model)) as source:
        assert_same_tensors(source, sparse_state)
        assert source.config() == CONFIG


def test_packs_and_unpacks(tmp_path, bitmask_model, sparse_state):
    pack_checkpoint(bitmask_model, tmp_path / "packed")
    assert verify_checkpoint(tmp_path / "packed", against=bitmask_model).ok
    unpack_checkpoint(tmp_path / "packed", tmp_path / "dense")
    with closing(open_source(tmp_path / "dense")) as source:
        assert_same_tensors(source, sparse_state)
    assert json.loads((tmp_path / "dense" / "config.json").read_text()) == CONFIG


def test_keeps_a_quantization_beside_the_sparsity(bitmask_model):
    config = json.loads((bitmask_model / "config.json").read_text())
    config["quantization_config"]["config_groups"] = {"group_0": {}}
    (bitmask_model / "config.json").write_text(json.dumps(config))
    kept = open_source(bitmask_model).config()["quantization_config"]
    assert kept == {"quant_method": "compressed-tensors", "config_groups": {"group_0": {}}}


def dense_twin(stored):
    stored[NAME] = torch.ones(2)


def without_shape(stored):
    del stored[f"{NAME}.shape"]


def short_shape(stored):
    stored[f"{NAME}.shape"] = torch.tensor([100, 67], dtype=torch.int32)


def other_shape(stored):
    stored[f"{NAME}.shape"] = torch.tensor([100, 75])


def negative_shape(stored):
    stored[f"{NAME}.shape"] = torch.tensor([-100, 67])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dense_twin, "both dense and as a bitmask"),
        (without_shape, "shape is missing"),
        (short_shape, "must be a list of int64"),
        (other_shape, "must hold 100 rows of 10 bytes"),
        (negative_shape, "malformed shape"),
    ],
)
def test_contradictions_are_found_on_opening(tmp_path, change, message):
    stored = compressed(NAME, sparse(100, 67))
    change(stored)
    save_file(stored, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match=message):
        open_source(tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("compressed", lambda t: t[:-1], "marks .* weights, .* holds"),
        ("compressed", lambda t: torch.cat([t, t[:1]]), "marks .* weights, .* holds"),
        ("bitmask", lambda t: t | 128, "bits past column 67"),
    ],
)
def test_contradictions_are_found_on_reading(tmp_path, part, change, message):
    stored = compressed(NAME, sparse(100, 67))
    stored[f"{NAME}.{part}"] = change(stored[f"{NAME}.{part}"])
    save_file(stored, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match=message):
        pack_checkpoint(tmp_path / "x.safetensors", tmp_path / "out")
    assert not list(tmp_path.glob("out*"))
