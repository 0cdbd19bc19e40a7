"""The index holds shards together, and cannot name what it has no business with."""

import json
import shutil
from contextlib import closing
from pathlib import Path

import pytest

from endor.checkpoint import inspect_checkpoint, open_source, unpack_checkpoint, verify_checkpoint
from endor.checkpoint.index import dense_file_names, is_dense_name, read_packed_index
from endor.checkpoint.loadable import open_layouts
from endor.checkpoint.sources.contract import SourceTensor
from endor.codecs import DTYPES
from endor.errors import ChecksumError, EndorWarning, FormatError
from endor.packing import pack_checkpoint

from .conftest import edit_index, make_old, weight, write_checkpoint

MIB = 1 << 20


@pytest.fixture
def packed(tmp_path, large_model):
    pack_checkpoint(large_model, tmp_path / "packed", max_shard_bytes=MIB)
    return tmp_path / "packed"


def opens(packed, out):
    """Return every way to read a packed checkpoint."""
    return (
        lambda: open_source(packed).close(),
        lambda: inspect_checkpoint(packed),
        lambda: unpack_checkpoint(packed, out),
        lambda: open_layouts(sorted(packed.glob("endor-*.safetensors"))),
    )


def test_a_shard_of_another_packing_is_noticed(tmp_path, packed):
    """The same architecture, other weights: each shard is whole, the checkpoint is not."""
    names = [f"model.layers.{layer}.mlp.up_proj.weight" for layer in range(16)]
    state = {name: weight(512, 512, seed=seed + 100) for seed, name in enumerate(names)}
    write_checkpoint(tmp_path / "model", state, shards=4)
    pack_checkpoint(tmp_path / "model", tmp_path / "other", max_shard_bytes=MIB)
    count = len(list(packed.glob("endor-*")))
    name = f"endor-00003-of-{count:05d}.safetensors"
    other = sorted((tmp_path / "other").glob("endor-*"))[2]
    shutil.copyfile(other, packed / name)
    for act in opens(packed, tmp_path / "dense"):
        with pytest.raises(ChecksumError, match=f"the header checksum of {name} must be"):
            act()
    assert not list(tmp_path.glob("dense*"))
    (problem,) = verify_checkpoint(packed).problems
    assert "does not describe the shards" in problem


def test_an_old_index_is_read_with_a_warning(tmp_path, packed, large_model):
    make_old(packed)
    for act in opens(packed, tmp_path / "dense"):
        with pytest.warns(EndorWarning, match="no checksums of shards.*pack the checkpoint again"):
            act()
    with pytest.warns(EndorWarning, match="no checksums"):
        assert verify_checkpoint(packed).ok
    with pytest.warns(EndorWarning, match="no checksums"):
        pack_checkpoint(packed, tmp_path / "new", max_shard_bytes=MIB)
    assert verify_checkpoint(tmp_path / "new", against=large_model).ok


COLLIDING = ["journal.jsonl", "config.json", "tokenizer.json", "model.safetensors.index.json"]
COLLIDING += ["a/b", "", "../a.safetensors", "/a.safetensors", ".a.safetensors", "a.bin", "."]
COLLIDING += ["endor-00001-of-00002.safetensors", "endor-00001.safetensors", "a\0.safetensors"]
COLLIDING += ["x" * 250 + ".safetensors"]


@pytest.mark.parametrize("name", [*COLLIDING, None, 5, ["a.safetensors"], {}])
def test_dense_names_that_collide_or_lead_away(tmp_path, packed, name):
    """Weights would be lost: overwritten by a companion, or outside of the output."""

    def change(document):
        document["metadata"]["endor"]["dense_files"][0] = name

    edit_index(packed, change)
    with pytest.raises(FormatError, match=r"dense files must be named|malformed index"):
        unpack_checkpoint(packed, tmp_path / "dense")
    assert not list(tmp_path.glob("dense*"))


@pytest.mark.parametrize(
    "file", ["other.safetensors", "../endor-00001-of-00001.safetensors", "endor.bin", 5, None, {}]
)
def test_shard_names_by_pattern_only(packed, file):
    def change(document):
        weights = document["weight_map"]
        weights[min(weights)] = file

    edit_index(packed, change)
    with pytest.raises(FormatError, match=r"shards must be named|malformed index"):
        read_packed_index(packed)


@pytest.mark.parametrize("companions", [["../a"], ["/a"], ["a//b"], [""], [5], "ab/../c", 5])
def test_companions_stay_inside(packed, companions):
    edit_index(packed, lambda d: d["metadata"]["endor"].update(companions=companions))
    with pytest.raises(FormatError, match="malformed index"):
        read_packed_index(packed)


@pytest.mark.parametrize("headers", [{}, [], 5, {"a": "b"}])
def test_headers_of_other_files(packed, headers):
    edit_index(packed, lambda d: d["metadata"]["endor"].update(headers=headers))
    with pytest.raises(FormatError, match="malformed index"):
        read_packed_index(packed)


def test_every_source_file_gets_a_name_of_its_own():
    files = ["w/a.safetensors", "w-a.safetensors", "a.bin", "a", "endor-00001.safetensors", "../x"]
    files += ["model.safetensors", "..", "y" * 300]
    bf16 = DTYPES["BF16"]
    names = dense_file_names(SourceTensor(str(i), bf16, (), f) for i, f in enumerate(files))
    assert len(set(names.values())) == len(files)
    assert all(map(is_dense_name, names.values()))
    assert names["1"] == "w-a.safetensors"
    assert names["6"] == "model.safetensors"


def test_a_file_without_the_usual_ending(tmp_path, model):
    (model / "model.safetensors").rename(tmp_path / "weights")
    pack_checkpoint(tmp_path / "weights", tmp_path / "packed")
    unpack_checkpoint(tmp_path / "packed", tmp_path / "dense")
    found = tmp_path / "dense" / "weights.safetensors"
    assert found.read_bytes() == (tmp_path / "weights").read_bytes()
    with (
        pytest.warns(EndorWarning, match=r"the only safetensors file"),
        closing(open_source(tmp_path / "dense")) as source,
    ):
        assert source.tensors


def test_the_documentation_names_every_member(packed):
    text = (Path(__file__).parents[2] / "docs" / "format.md").read_text()
    document = json.loads((packed / "endor.safetensors.index.json").read_text())
    assert all(f"| `{member}` |" in text for member in document["metadata"]["endor"])
