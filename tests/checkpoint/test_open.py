import errno
import json
import os
import pickle
import struct
from contextlib import closing

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from endor.checkpoint import open_source
from endor.checkpoint.sources.safetensors import read_header
from endor.errors import CheckpointError, EndorWarning
from endor.packing import pack_checkpoint
from endor.storage.positioned import OpenFiles

from .conftest import assert_same_tensors, weight, write_checkpoint


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
@pytest.mark.parametrize("shards", [1, 3])
def test_reads_every_kind(tmp_path, state, kind, shards):
    path = write_checkpoint(tmp_path / "m", state, shards=shards, kind=kind)
    with closing(open_source(path)) as source:
        assert_same_tensors(source, state)
        assert source.config()["model_type"] == "llama"
        assert not source.ordered


def test_reads_legacy_bin_and_views(tmp_path):
    """Files that cannot be mapped; and tensors that are slices, transposed, or share memory."""
    base = weight(8, 6)
    state = {"a": base, "b": base.t(), "c": base[2:4], "d": base[:, 1]}
    (tmp_path / "m").mkdir()
    path = tmp_path / "m" / "pytorch_model.bin"
    for new in (True, False):
        torch.save(state, path, _use_new_zipfile_serialization=new)
        with closing(open_source(path.parent)) as source:
            for _ in range(2):
                assert_same_tensors(source, state)


def test_reads_a_lone_file(tmp_path, state):
    save_file(state, tmp_path / "weights.safetensors")
    with closing(open_source(tmp_path / "weights.safetensors")) as source:
        assert_same_tensors(source, state)
        assert source.directory is None
        assert source.config() is None


def test_reads_a_packed_checkpoint(tmp_path, model, state):
    pack_checkpoint(model, tmp_path / "packed")
    with closing(open_source(tmp_path / "packed")) as source:
        assert_same_tensors(source, state)


def test_prefers_safetensors(tmp_path, model, state):
    torch.save({"other": torch.ones(2)}, model / "pytorch_model.bin")
    with pytest.warns(EndorWarning, match="leaves alone pytorch_model.bin"):
        source = open_source(model)
    with closing(source):
        assert source.tensors.keys() == state.keys()


def test_fingerprint_changes_with_the_files(model):
    first = open_source(model).fingerprint()
    assert open_source(model).fingerprint() == first
    path = model / "model.safetensors"
    path.write_bytes(path.read_bytes())
    assert open_source(model).fingerprint() != first


def header(fields, data=b""):
    text = json.dumps(fields).encode() if not isinstance(fields, bytes) else fields
    return struct.pack("<Q", len(text)) + text + data


def entry(dtype="U8", shape=(4,), offsets=(0, 4)):
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"abc", "needs 8 for the header length"),
        (struct.pack("<Q", 1 << 40), "not a safetensors file, or it is damaged"),
        (header(b"not json"), "must begin with"),
        (header(b"{\xff\xff}"), "not UTF-8"),
        (header(b"[]"), "must begin with"),
        (header(b'{"a": {}, "a": {}}'), "key 'a' occurs twice"),
        (header({"a": {"dtype": "U8"}}), "a: must hold dtype, shape"),
        (header({"a": entry(shape=(-4,))}), "a: shape must be a list of sizes"),
        (header({"a": entry(dtype="F3")}, b"1234"), "a: unknown dtype 'F3'"),
        (header({"a": entry(dtype=[])}, b"1234"), "a: dtype must be a string"),
        (header({"a": entry(shape=(0, 2**62), offsets=(0, 0))}), "that an array can have"),
        (header({"__metadata__": [1]}), "must map strings to strings"),
        (header(b'{"a":' + b"[" * 100_000), "nested deeper"),
        (header(b'{"a":' + b"9" * 5000 + b"}"), "5000 digits"),
        (header(b'{"\\ud800": 1}'), "surrogate"),
        (header(b'{"a\\u0000": 1}'), "NUL"),
        (header({"a": entry(dtype="BF16")}, b"1234"), "must take 8 bytes, data_offsets give 4"),
        (header({"a": entry()}, b"12"), "truncated: has 70 bytes, needs 72"),
        (header({"a": entry()}, b"12345"), "1 bytes follow"),
        (header({"a": entry(offsets=(1, 5))}, b"12345"), "a: must start at byte"),
        (header({"a": entry(), "b": entry()}, b"1234"), "must start at byte"),
    ],
)
def test_malformed_safetensors(tmp_path, content, message):
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_header(path)
    assert str(path) in str(caught.value)


def test_file_that_shrinks(tmp_path):
    (tmp_path / "x").write_bytes(b"12345678")
    with closing(OpenFiles()) as files, pytest.raises(CheckpointError, match="ends at byte"):
        files.read_into(tmp_path / "x", 4, np.empty(8, dtype=np.uint8))


def shards_of(directory):
    return sorted(directory.glob("model-*"))


def remove_shard(directory):
    shards_of(directory)[1].unlink()


def truncate_shard(directory):
    path = shards_of(directory)[1]
    path.write_bytes(path.read_bytes()[:-10])


def repeat_name(directory):
    save_file({"lm_head.weight": torch.ones(1)}, shards_of(directory)[0])


def edit_index(change):
    def apply(directory):
        path = directory / "model.safetensors.index.json"
        document = json.loads(path.read_text())
        change(document["weight_map"])
        path.write_text(json.dumps(document))

    return apply


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (remove_shard, "1 of 3 shards are missing: model-00002-of-00003"),
        (truncate_shard, "truncated"),
        (repeat_name, r"lm_head\.weight is both in .* and differs"),
        (edit_index(lambda m: m.update(ghost=m["counter"])), "lists ghost, which no shard holds"),
        (edit_index(lambda m: m.update(counter="../x")), "must map to a file beside the index"),
        (edit_index(lambda m: m.clear()), "weight_map must map"),
    ],
)
def test_contradicting_shards(tmp_path, state, damage, message):
    path = write_checkpoint(tmp_path / "m", state, shards=3)
    damage(path)
    with pytest.raises(CheckpointError, match=message):
        open_source(path)


class Evil:
    def __reduce__(self):
        return print, ("pickled code ran",)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (Evil(), "not a loadable weights-only"),
        ([1, 2], "must hold a state dict"),
        ({"a": {"b": torch.ones(1)}}, "must map names to tensors; 'a'"),
        ({"a": torch.ones(2, 2).to_sparse()}, "a: .* not supported"),
    ],
)
def test_bad_bin(tmp_path, capfd, value, message):
    torch.save(value, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=message):
        open_source(tmp_path)
    assert "pickled code ran" not in capfd.readouterr().out


@pytest.mark.parametrize("content", [b"", b"garbage", b"PK\x03\x04 garbage", pickle.dumps(1)])
def test_bin_that_is_none(tmp_path, content):
    (tmp_path / "pytorch_model.bin").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin"):
        open_source(tmp_path)


def test_nothing_to_read(tmp_path):
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        open_source(tmp_path / "absent")
    with pytest.raises(CheckpointError, match="no weights here"):
        open_source(tmp_path)
    for name in ("a", "b"):
        save_file({name: torch.ones(1)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(
        CheckpointError, match=r"2 safetensors files \(a.safetensors, b.safetensors\) but neither"
    ):
        open_source(tmp_path)


def test_a_packed_file_alone_is_refused(tmp_path, model):
    pack_checkpoint(model, tmp_path / "packed")
    with pytest.raises(CheckpointError, match="is packed by Endor"):
        open_source(tmp_path / "packed" / "endor-00001-of-00001.safetensors")


def test_what_closing_a_source_says_changes_nothing(tmp_path, monkeypatch):
    """A disk may refuse that, too; the output is there by then."""
    path = tmp_path / "file"
    path.write_bytes(b"12345678")
    files = OpenFiles()
    files.read_into(path, 0, np.empty(8, np.uint8))

    def refuse(fd: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as context:
        context.setattr(os, "close", refuse)
        files.close()
