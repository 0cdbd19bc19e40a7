"""Which files are taken for the model, what an index may say, and what is no checkpoint at all."""

import json
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from endor.checkpoint import open_source, unpack_checkpoint, verify_checkpoint
from endor.errors import CheckpointError, EndorWarning
from endor.packing import pack_checkpoint

from .conftest import assert_same_tensors, weight, write_checkpoint

INDEX = "model.safetensors.index.json"
OTHER = {"model.layers.0.mlp.up_proj.weight": torch.ones(64, 64)}


@pytest.fixture
def small():
    return {
        f"model.layers.{layer}.mlp.up_proj.weight": weight(64, 64, seed=layer)
        for layer in "012"
        for layer in [int(layer)]
    }


def opened(path):
    return closing(open_source(path))


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize(
    "stranger", ["adapter_model.safetensors", "consolidated.safetensors", "model.fp16.safetensors"]
)
def test_strangers_are_named_and_left_alone(tmp_path, small, kind, shards, stranger):
    path = write_checkpoint(tmp_path / "m", small, shards=shards, kind=kind)
    save_file(OTHER, path / stranger)
    (path / "original").mkdir()
    (path / "training_args.bin").write_bytes(b"x")
    with pytest.warns(EndorWarning, match=f"leaves alone {stranger}, original/") as caught:
        source = open_source(path)
    assert "training_args" not in str(caught[0].message)
    with closing(source):
        assert_same_tensors(source, small)


def test_a_lone_stranger_is_taken_with_a_warning(tmp_path, small):
    path = write_checkpoint(tmp_path / "m", small)
    (path / "model.safetensors").rename(path / "weights.safetensors")
    with pytest.warns(EndorWarning, match=r"takes weights\.safetensors, the only"):
        pack_checkpoint(path, tmp_path / "p")
    unpack_checkpoint(tmp_path / "p", tmp_path / "u")
    assert (tmp_path / "u" / "weights.safetensors").exists()


def test_the_file_that_the_config_names(tmp_path, small):
    path = write_checkpoint(tmp_path / "m", OTHER)
    save_file(small, path / "chosen.safetensors")
    (path / "config.json").write_text('{"transformers_weights": "chosen.safetensors"}')
    with pytest.warns(EndorWarning, match=r"leaves alone model\.safetensors"):
        source = open_source(path)
    with closing(source):
        assert_same_tensors(source, small)
    for name in ("../x.safetensors", "/x.safetensors", "x.bin", 3, "absent.safetensors"):
        (path / "config.json").write_text(json.dumps({"transformers_weights": name}))
        with pytest.raises(CheckpointError, match="transformers_weights"):
            open_source(path)


def edit_index(path, change, name=INDEX):
    document = json.loads((path / name).read_text())
    change(document["weight_map"])
    (path / name).write_text(json.dumps(document))


ROTARY = "model.layers.0.self_attn.rotary_emb.inv_freq"


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update({ROTARY: next(iter(m.values()))}), "in no shard"),
        (lambda m: m.pop("model.layers.1.mlp.up_proj.weight"), "not listed; taken"),
        (
            lambda m: m.update({name: max(m.values()) for name in [min(m)]}),
            "in another shard than listed",
        ),
    ],
)
def test_an_index_that_differs_in_no_weight(tmp_path, small, kind, change, message):
    path = write_checkpoint(tmp_path / "m", small, shards=2, kind=kind)
    name = INDEX if kind == "safetensors" else "pytorch_model.bin.index.json"
    edit_index(path, change, name)
    with pytest.warns(EndorWarning, match=message):
        source = open_source(path)
    with closing(source):
        assert_same_tensors(source, small)


def test_a_tied_head_may_be_listed(tmp_path, small):
    path = write_checkpoint(tmp_path / "m", small, shards=2)
    edit_index(path, lambda m: m.update({"lm_head.weight": next(iter(m.values()))}))
    with pytest.raises(CheckpointError, match=r"lists lm_head\.weight, which no shard"):
        open_source(path)
    (path / "config.json").write_text('{"tie_word_embeddings": true}')
    with pytest.warns(EndorWarning, match="in no shard"), opened(path) as source:
        assert_same_tensors(source, small)


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_a_tensor_in_two_shards(tmp_path, small, kind):
    path = write_checkpoint(tmp_path / "m", small, shards=2, kind=kind)
    one, other = sorted(file for file in path.iterdir() if "-of-" in file.name)
    name = "model.layers.0.mlp.up_proj.weight"

    def write(value):
        content = {
            key: tensor for key, tensor in small.items() if "layers.2" in key or "layers.1" in key
        }
        tensors = content | {name: value}
        if kind == "bin":
            torch.save(tensors, other)
        else:
            save_file(tensors, other)

    write(small[name].clone())
    with (
        pytest.warns(EndorWarning, match="in two shards with the same bits"),
        opened(path) as found,
    ):
        assert_same_tensors(found, small)
    write(small[name] + 1)
    with pytest.raises(CheckpointError, match=f"{name} is both in {one.name} and {other.name}"):
        open_source(path)


def test_sub_folders_and_repeated_names(tmp_path, small):
    path = write_checkpoint(tmp_path / "m", small)
    (path / "w").mkdir()
    (path / "model.safetensors").rename(path / "w" / "a.safetensors")
    entries = [f'"{name}": "w/a.safetensors"' for name in [*small, next(iter(small))]]
    (path / INDEX).write_text('{"metadata": {}, "weight_map": {' + ", ".join(entries) + "}}")
    with opened(path) as source:
        assert_same_tensors(source, small)
    pack_checkpoint(path, tmp_path / "p")
    unpack_checkpoint(tmp_path / "p", tmp_path / "u")
    assert (tmp_path / "u" / "w-a.safetensors").exists()
    for file in ("../a.safetensors", "/a.safetensors", "w/../../a.safetensors", "a\0", "./x", 3):
        edit_index(path, lambda m, file=file: m.update(x=file))
        with pytest.raises(CheckpointError, match="x: must map to a file"):
            open_source(path)


def test_a_stale_single_file(tmp_path, small):
    path = write_checkpoint(tmp_path / "m", OTHER, shards=1)
    save_file(small, path / "model-00001-of-00001.safetensors")
    names = dict.fromkeys(small, "model-00001-of-00001.safetensors")
    (path / INDEX).write_text(json.dumps({"weight_map": names}))
    with pytest.warns(EndorWarning) as caught, opened(path) as source:
        assert_same_tensors(source, OTHER)
    assert "remove the stale one" in str(caught[0].message)
    assert "leaves alone model-00001-of-00001.safetensors" in str(caught[1].message)


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n"


def hub(folder):
    revision = folder / "models--org--name" / "snapshots" / "abc"
    revision.mkdir(parents=True)
    refs = folder / "models--org--name" / "refs"
    refs.mkdir()
    (refs / "main").write_text("abc")
    return folder


@pytest.mark.parametrize(
    ("files", "give", "message"),
    [
        ({"x.gguf": b"GGUF\3\0"}, "x.gguf", "is a damaged or unknown GGUF file: .* ends too early"),
        ({"x.gguf": b"GGUF\3\0"}, "", "holds x.gguf, which is a GGUF file"),
        ({"x.bin": b"PK\3\4abc"}, "x.bin", "is a PyTorch file; give the directory"),
        ({"x.pth": b"\x80\2abc"}, "x.pth", "is a PyTorch file; give the directory"),
        ({"model.safetensors": LFS}, "model.safetensors", "git-LFS pointer.*git lfs pull"),
        ({"model.safetensors": LFS}, "", "git-LFS pointer.*git lfs pull"),
        ({"pytorch_model.bin": LFS}, "", "git-LFS pointer.*git lfs pull"),
        ({"config.json": LFS, "model.safetensors": b""}, "", "config.json: is a git-LFS pointer"),
        ({INDEX: LFS}, "", "index.json: is a git-LFS pointer"),
        ({INDEX: b'{"weight_map": {}}'}, INDEX, "is a JSON file; give the directory"),
        ({"model.safetensors": b"<!doctype html>"}, "", "is a web page"),
        ({"adapter_config.json": b"{}"}, "", "a LoRA adapter, not a model; merge it first"),
        ({"adapter_model.safetensors": b""}, "", "a LoRA adapter, not a model; merge it first"),
        ({"adapter_model.bin": b""}, "", "a LoRA adapter, not a model; merge it first"),
        ({"consolidated.00.pth": b""}, "", "the layout of the model's authors"),
        ({"model_index.json": b"{}"}, "", "diffusers pipeline"),
    ],
)
def test_what_is_no_checkpoint(tmp_path, files, give, message):
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        open_source(tmp_path / give)
    assert "\n" not in str(caught.value)


def test_the_hub(tmp_path, monkeypatch):
    cache = hub(tmp_path / "hub")
    for given in (cache, cache / "models--org--name"):
        with pytest.raises(CheckpointError, match="snapshots/abc"):
            open_source(given)


def test_more_shards_than_descriptors(tmp_path):
    """Packing, verifying, unpacking and comparing keep a bounded number of files open."""
    folder = tmp_path / "m"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    names = {}
    for number in range(150):
        # two tensors of each shard lie far apart in execution order: unpacking interleaves
        state = {f"model.layers.{number}.a.weight": torch.full((2, 2), float(number))}
        state[f"model.layers.{999 - number}.b.weight"] = torch.full((3,), float(number))
        file = f"model-{number + 1:05d}-of-00150.safetensors"
        save_file(state, folder / file, metadata={"format": "pt"})
        names |= dict.fromkeys(state, file)
    (folder / INDEX).write_text(json.dumps({"weight_map": names}))
    script = (
        "import resource, sys\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (100, 100))\n"
        "from endor.checkpoint import *\n"
        "from endor.packing import pack_checkpoint\n"
        "m, p, u = sys.argv[1:]\n"
        "pack_checkpoint(m, p)\n"
        "assert verify_checkpoint(p, against=m).ok\n"
        "unpack_checkpoint(p, u)\n"
        "assert verify_checkpoint(p, against=u).ok\n"
    )
    places = [str(tmp_path / name) for name in "mpu"]
    done = subprocess.run(
        [sys.executable, "-c", script, *places], check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    for file in names.values():
        assert (tmp_path / "u" / file).read_bytes() == (folder / file).read_bytes()


def test_a_shard_that_is_exchanged_while_it_is_read(tmp_path, small):
    path = write_checkpoint(tmp_path / "m", small)
    file = path / "model.safetensors"
    with opened(path) as source:
        out = np.empty(64 * 64 * 2, dtype=np.uint8)
        source.read_into(next(iter(small)), out)
        source._files._limit = 0
        source._files._shrink()
        save_file(OTHER, tmp_path / "new")
        (tmp_path / "new").replace(file)
        with pytest.raises(CheckpointError, match="was changed while it was read"):
            source.read_into(next(iter(small)), out)


def test_narrow_and_rare_dtypes_are_carried(tmp_path):
    raw = torch.arange(128, dtype=torch.uint8).reshape(8, 16)
    kinds = [torch.float4_e2m1fn_x2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz]
    kinds += [torch.float8_e8m0fnu, torch.float8_e4m3fn, torch.float8_e5m2, torch.int8]
    state = {str(kind): raw.clone().view(kind) for kind in kinds}
    state["model.layers.0.mlp.up_proj.weight"] = weight(64, 64)
    state["flag"] = torch.tensor([True, False])
    path = write_checkpoint(tmp_path / "m", state)
    pack_checkpoint(path, tmp_path / "p")
    assert verify_checkpoint(tmp_path / "p", against=path).ok
    unpack_checkpoint(tmp_path / "p", tmp_path / "u")
    name = "model.safetensors"
    assert (tmp_path / "u" / name).read_bytes() == (path / name).read_bytes()
    import endor

    for file in (path / name, *(tmp_path / "p").glob("endor-*.safetensors")):
        for key, tensor in endor.load_file(file).items():
            assert (tensor.dtype, tensor.shape) == (state[key].dtype, state[key].shape)
            assert torch.equal(tensor.view(torch.uint8), state[key].view(torch.uint8))


class Wide(torch.nn.Module):
    pass


@pytest.mark.parametrize("new", [True, False])
@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (torch.ones(1).expand(10**6, 10**6), "w: is expanded"),
        (torch.ones(2, 2, device="meta"), "w: .*not supported|w: .*meta"),
        (torch.ones(2, 2).to_sparse(), "w: .*not supported"),
        (torch.ones(2, dtype=torch.complex64).conj(), "w: .*not supported"),
        (torch.ones(2, dtype=torch.complex128), "w: .*not supported|unpickl|weights-only"),
        (Wide(), "not a loadable weights-only"),
    ],
)
def test_tensors_without_data_of_their_own(tmp_path, tensor, message, new):
    torch.save({"w": tensor}, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=new)
    if not new and isinstance(tensor, torch.Tensor) and tensor.is_conj():
        return  # the old format resolves them
    with pytest.raises(CheckpointError, match=message) as caught:
        open_source(tmp_path)
    assert "pytorch_model.bin" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("what", ["plain", "bin"])
def test_a_file_that_shrinks_while_it_is_open(tmp_path, what):
    """Mapped pages behind the end of a file end the process with SIGBUS; reads raise."""
    (tmp_path / "m").mkdir()
    name = "model.safetensors" if what == "plain" else "pytorch_model.bin"
    path = Path(tmp_path / "m" / name)
    state = {f"t{number}": torch.ones(1 << 16) for number in range(8)}
    save_file(state, path) if what == "plain" else torch.save(state, path)
    script = (
        "import sys, os, numpy as np, endor\n"
        "from endor.checkpoint import open_source\n"
        "path = sys.argv[1]\n"
        "try:\n"
        "    if path.endswith('.bin'):\n"
        "        source = open_source(os.path.dirname(path))\n"
        "        os.truncate(path, 4096)\n"
        "        for name, tensor in source.tensors.items():\n"
        "            source.read_into(name, np.empty(tensor.nbytes, np.uint8))\n"
        "    else:\n"
        "        with endor.safe_open(path) as file:\n"
        "            os.truncate(path, 4096)\n"
        "            print([file.get_tensor(name).sum() for name in file.keys()])\n"
        "except endor.EndorError as error:\n"
        "    print('refused', error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(path)], check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("refused")
