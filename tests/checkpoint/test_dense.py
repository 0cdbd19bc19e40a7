import json
from contextlib import closing

import pytest
import torch
from safetensors.torch import save_file

from endor.checkpoint import open_source, unpack_checkpoint
from endor.checkpoint.dense import DTYPE_ORDER
from endor.checkpoint.select import select
from endor.codecs import DTYPES
from endor.errors import CheckpointError, ChecksumError, ConfigError
from endor.packing import pack_checkpoint, prune_checkpoint

from .conftest import assert_same_tensors, read_bits, weight, write_checkpoint

MIB = 1 << 20


def test_every_dtype_has_a_place():
    assert set(DTYPE_ORDER) == set(DTYPES)


def test_files_are_the_librarys_own(tmp_path):
    """Element types and names in the order, and the header in the form, of safetensors itself."""
    kinds = "bfloat16 float16 float32 float64 int8 uint8 int16 int32 int64 bool uint16 uint32"
    kinds += " uint64 float8_e4m3fn float8_e5m2 float8_e8m0fnu complex64"
    state = {
        f"{place % 3}é.{kind}": torch.ones(3, 5).to(getattr(torch, kind))
        for place, kind in enumerate(kinds.split())
    }
    model = tmp_path / "x.safetensors"
    save_file(state, model, metadata={"format": "pt"})
    pack_checkpoint(model, tmp_path / "packed")
    unpack_checkpoint(tmp_path / "packed", tmp_path / "dense")
    assert (tmp_path / "dense" / "x.safetensors").read_bytes() == model.read_bytes()


def test_pruned_dense(tmp_path, model, state):
    report = prune_checkpoint(model, tmp_path / "pruned", sparsity=0.75)
    assert report.pruned_tensors == 31
    assert report.sparsity == pytest.approx(0.75, abs=0.001)
    assert report.zeros == round(report.weights * report.sparsity)
    assert report.dense_bytes == sum(t.numel() * t.element_size() for t in state.values())
    names = {path.name for path in model.iterdir()}
    assert {path.name for path in (tmp_path / "pruned").iterdir()} == names
    config = json.loads((tmp_path / "pruned" / "config.json").read_text())
    assert "quantization_config" not in config
    with closing(open_source(tmp_path / "pruned")) as source:
        selected = select(source.tensors.values())
        assert len(selected) == 31
        assert_same_tensors(
            source, state | {name: pruned(source, state, name) for name in selected}
        )


def pruned(source, state, name):
    """Return a pruned tensor after checking that survivors kept their bits."""
    like = state[name]
    bits = torch.from_numpy(read_bits(source, name)).view(torch.int16).view(like.shape)
    assert ((bits == like.view(torch.int16)) | (bits == 0)).all()
    matrices = (bits == 0).view(-1, bits.shape[-2] * bits.shape[-1]).sum(1).tolist()
    assert set(matrices) == {round(0.75 * bits.shape[-2] * bits.shape[-1])}
    return bits


def test_pack_of_pruned_equals_pruning_pack(tmp_path, model, content):
    prune_checkpoint(model, tmp_path / "pruned")
    pack_checkpoint(tmp_path / "pruned", tmp_path / "a")
    pack_checkpoint(model, tmp_path / "b", prune="magnitude")
    a, b = content(tmp_path / "a"), content(tmp_path / "b")
    assert {k: v for k, v in a.items() if k != "config.json"} == {
        k: v for k, v in b.items() if k != "config.json"
    }


def test_resume(tmp_path, large_model, content):
    pack_checkpoint(large_model, tmp_path / "packed", max_shard_bytes=2 * MIB)

    def stop(done, total):
        if done >= 5 * MIB:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        unpack_checkpoint(tmp_path / "packed", tmp_path / "out", progress=stop)
    assert not (tmp_path / "out").exists()
    left = sorted(path.name for path in (tmp_path / "out.partial" / "content").iterdir())
    assert left == [
        "model-00001-of-00004.safetensors",
        "model-00002-of-00004.safetensors",
    ]
    report = unpack_checkpoint(tmp_path / "packed", tmp_path / "out", resume=True)
    assert report.resumed_files == 2
    unpack_checkpoint(tmp_path / "packed", tmp_path / "whole")
    assert content(tmp_path / "out") == content(tmp_path / "whole")


@pytest.mark.parametrize(
    ("damage", "message"),
    [(lambda p: p.unlink(), "is missing"), (lambda p: p.write_bytes(b"x"), "was changed")],
)
def test_resume_with_a_damaged_file(tmp_path, large_model, damage, message):
    def stop(done, total):
        if done >= 5 * MIB:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prune_checkpoint(large_model, tmp_path / "out", progress=stop)
    damage(tmp_path / "out.partial" / "content" / "model-00001-of-00004.safetensors")
    with pytest.raises(CheckpointError, match=message):
        prune_checkpoint(large_model, tmp_path / "out", resume=True)


@pytest.mark.parametrize("name", ["../precious", "config.json", None, 5, [], {}])
def test_a_planted_name_is_refused(tmp_path, large_model, name):
    def stop(done, total):
        if done >= 5 * MIB:
            raise KeyboardInterrupt

    (tmp_path / "precious").write_text("mine")
    with pytest.raises(KeyboardInterrupt):
        prune_checkpoint(large_model, tmp_path / "out", progress=stop)
    journal = tmp_path / "out.partial" / "journal.jsonl"
    with journal.open("a") as file:
        file.write(json.dumps({"file": name, "bytes": 4, "xxh3_64": "0"}) + "\n")
    with pytest.raises(CheckpointError, match="which is no file of this checkpoint"):
        prune_checkpoint(large_model, tmp_path / "out", resume=True)
    assert (tmp_path / "precious").read_text() == "mine"


def test_damage_is_never_unpacked(tmp_path, model):
    pack_checkpoint(model, tmp_path / "packed")
    path = tmp_path / "packed" / "endor-00001-of-00001.safetensors"
    content = bytearray(path.read_bytes())
    content[-5000] ^= 1
    path.write_bytes(content)
    with pytest.raises(ChecksumError):
        unpack_checkpoint(tmp_path / "packed", tmp_path / "dense")
    assert not list(tmp_path.glob("dense*"))


def test_only_packed_directories_unpack(tmp_path, model):
    with pytest.raises(CheckpointError, match="no packed checkpoint here"):
        unpack_checkpoint(model, tmp_path / "dense")
    pack_checkpoint(model, tmp_path / "packed")
    (tmp_path / "packed" / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="quant_method 'endor'"):
        unpack_checkpoint(tmp_path / "packed", tmp_path / "dense")


def test_pruning_nothing(tmp_path):
    model = write_checkpoint(tmp_path / "m", {"embed.weight": weight(64, 64)})
    with pytest.raises(ConfigError, match="nothing to prune"):
        prune_checkpoint(model, tmp_path / "out")
