"""What follows a checkpoint, what stays behind, and which links are followed."""

import json

import pytest

from endor.checkpoint import unpack_checkpoint
from endor.errors import CheckpointError
from endor.packing import pack_checkpoint, prune_checkpoint


def names(path):
    return {str(item.relative_to(path)) for item in path.rglob("*") if item.is_file()}


@pytest.fixture
def secret(tmp_path):
    path = tmp_path / "home" / "secret"
    path.mkdir(parents=True)
    (path / "key").write_text("secret")
    return path


def link_file(model, secret):
    (model / "notes.txt").symlink_to(secret / "key")


def link_relative(model, secret):
    (model / "tokenizer.json").unlink()
    (model / "tokenizer.json").symlink_to("../home/secret/key")


def link_of_link(model, secret):
    (model / "a.txt").symlink_to("b.txt")
    (model / "b.txt").symlink_to(secret / "key")


def link_config(model, secret):
    (secret / "config.json").write_text('{"auth": "token"}')
    (model / "config.json").unlink()
    (model / "config.json").symlink_to(secret / "config.json")


def link_below(model, secret):
    (model / "additional_chat_templates" / "x.jinja").symlink_to(secret / "key")


def link_folder(model, secret):
    (model / "additional_chat_templates" / "x").symlink_to(secret)


def link_templates(model, secret):
    for path in (model / "additional_chat_templates").iterdir():
        path.unlink()
    (model / "additional_chat_templates").rmdir()
    (model / "additional_chat_templates").symlink_to(secret)


def link_named_folder(model, secret):
    (model / "modules.json").write_text('[{"path": "1_Pooling"}]')
    (model / "1_Pooling").symlink_to(secret)


def link_blobs_of_another(model, secret):
    """Looks like a hub cache, and the checkpoint is in none."""
    blobs = secret / "models--x--y" / "blobs"
    blobs.mkdir(parents=True)
    (secret / "key").rename(blobs / "key")
    (model / "notes.txt").symlink_to(blobs / "key")


@pytest.mark.parametrize("convert", [pack_checkpoint, prune_checkpoint])
@pytest.mark.parametrize(
    "link",
    [
        link_file,
        link_relative,
        link_of_link,
        link_config,
        link_below,
        link_folder,
        link_templates,
        link_named_folder,
        link_blobs_of_another,
    ],
)
def test_links_that_lead_out_are_refused(tmp_path, model, secret, link, convert):
    """Outputs are uploaded: a checkpoint must not pick files of this machine for them."""
    link(model, secret)
    with pytest.raises(CheckpointError, match=r"is a link to .*replace it by a copy"):
        convert(model, tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


def test_links_inside_the_checkpoint_are_followed(tmp_path, model):
    (model / "other.json").symlink_to("tokenizer.json")
    pack_checkpoint(model, tmp_path / "out")
    assert (tmp_path / "out" / "other.json").read_text() == (model / "tokenizer.json").read_text()
    assert not (tmp_path / "out" / "other.json").is_symlink()


def test_a_hub_cache(tmp_path, model):
    """models--x--y/snapshots/REV/file -> ../../blobs/HASH, through a link to the snapshot too."""
    repo = tmp_path / "hub" / "models--x--y"
    snapshot = repo / "snapshots" / "0a1b"
    (repo / "blobs").mkdir(parents=True)
    for number, path in enumerate(sorted(p for p in model.rglob("*") if p.is_file())):
        place = snapshot / path.relative_to(model)
        place.parent.mkdir(parents=True, exist_ok=True)
        path.rename(repo / "blobs" / str(number))
        up = "../" * len(place.relative_to(repo).parts[:-1])
        place.symlink_to(f"{up}blobs/{number}")
    (tmp_path / "model").rename(tmp_path / "gone")
    (tmp_path / "model").symlink_to(snapshot)
    for source in (snapshot, tmp_path / "model"):
        pack_checkpoint(source, tmp_path / "out", overwrite=True)
        assert {"tokenizer.json", "additional_chat_templates/tool.jinja"} <= names(tmp_path / "out")
    (snapshot / "stolen.txt").symlink_to(tmp_path / "hub" / "token")
    (tmp_path / "hub" / "token").write_text("hf_secret")
    with pytest.raises(CheckpointError, match=r"stolen\.txt: is a link"):
        pack_checkpoint(snapshot, tmp_path / "out", overwrite=True)


@pytest.mark.filterwarnings("ignore:.*leaves alone")
def test_folders_that_a_config_names(tmp_path, model):
    """sentence-transformers keeps each module in its folder; a dense one has weights there."""
    modules = [
        {"idx": 0, "path": "", "type": "sentence_transformers.models.Transformer"},
        {"idx": 1, "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
        {"idx": 2, "path": "2_Dense/", "type": "sentence_transformers.models.Dense"},
    ]
    (model / "modules.json").write_text(json.dumps(modules))
    (model / "router_config.json").write_text('{"types": {"query_0_Sparse": "x"}}')
    kept = ["1_Pooling/config.json", "2_Dense/model.safetensors", "2_Dense/a/b.txt"]
    kept += ["query_0_Sparse/config.json"]
    dropped = ["original/params.json", "onnx/model.onnx", "1_Pooling/.git", ".cache/x"]
    for name in [*kept, *dropped]:
        (model / name).parent.mkdir(parents=True, exist_ok=True)
        (model / name).write_text(name)
    report = pack_checkpoint(model, tmp_path / "packed")
    unpack_checkpoint(tmp_path / "packed", tmp_path / "dense")
    for out in ("packed", "dense"):
        found = names(tmp_path / out)
        assert found >= set(kept)
        assert not found & set(dropped)
    assert (tmp_path / "dense" / "2_Dense" / "a" / "b.txt").read_text() == "2_Dense/a/b.txt"
    assert report.left_out == ("onnx/", "original/")
    pack_checkpoint(model, tmp_path / "packed", overwrite=True)


OTHER_WEIGHTS = ["a.onnx_data", "a.npy", "a.pdparams", "a.pkl", "a.zip", "a.tar.gz", "a.gguf"]
OTHER_WEIGHTS += ["adapter_model.safetensors", "pytorch_model.bin", "model.fp16.h5", "a.onnx.data"]
INDEXES = ["model.safetensors.index.fp32.json", "pytorch_model.bin.index.json"]
INDEXES += ["tf_model.h5.index.json", "flax_model.msgpack.index.json"]


@pytest.mark.filterwarnings("ignore:.*leaves alone")
def test_other_weights_are_named_and_left(tmp_path, model):
    for name in [*OTHER_WEIGHTS, *INDEXES]:
        (model / name).write_bytes(b"other")
    with (model / "consolidated.00").open("wb") as file:
        file.truncate(1 << 30)
    report = pack_checkpoint(model, tmp_path / "out")
    assert report.left_out == tuple(sorted([*OTHER_WEIGHTS, "consolidated.00"]))
    assert report.to_dict()["left_out"] == list(report.left_out)
    assert not names(tmp_path / "out") & {*OTHER_WEIGHTS, *INDEXES, "consolidated.00"}


def test_own_weights_are_not_other_weights(tmp_path, large_model, state):
    from .conftest import write_checkpoint

    assert pack_checkpoint(large_model, tmp_path / "a").left_out == ()
    assert unpack_checkpoint(tmp_path / "a", tmp_path / "b").left_out == ()
    torch_model = write_checkpoint(tmp_path / "bin", state, shards=2, kind="bin")
    assert pack_checkpoint(torch_model, tmp_path / "c").left_out == ()


@pytest.mark.parametrize("name", ["journal.jsonl", "content", "replaced", "vocab.txt", "a b é"])
def test_no_companion_vanishes(tmp_path, model, name):
    (model / name).write_text("mine")
    pack_checkpoint(model, tmp_path / "packed")
    unpack_checkpoint(tmp_path / "packed", tmp_path / "dense")
    assert (tmp_path / "dense" / name).read_text() == "mine"


def test_names_that_are_no_unicode_are_left_out_and_named(tmp_path, model):
    import os

    (model / os.fsdecode(b"caf\xe9.txt")).write_text("mine")
    report = pack_checkpoint(model, tmp_path / "out")
    assert report.left_out == ("caf\\udce9.txt",)


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_an_adapter_beside_the_model_goes_with_its_config(tmp_path, model, suffix):
    """transformers applies the two together, and fails where one is missing."""
    name = f"adapter_model.{suffix}"
    (model / name).write_bytes(b"adapter")
    (model / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    assert pack_checkpoint(model, tmp_path / "packed").left_out == ()
    assert unpack_checkpoint(tmp_path / "packed", tmp_path / "dense").left_out == ()
    for out in ("packed", "dense"):
        assert (tmp_path / out / name).read_bytes() == b"adapter"
        assert (tmp_path / out / "adapter_config.json").exists()
    assert names(tmp_path / "dense") == names(model)
