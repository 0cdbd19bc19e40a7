import json
import os
import resource
import signal
import subprocess
import sys
from contextlib import closing

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from endor.checkpoint import inspect_checkpoint, open_source, unpack_checkpoint, verify_checkpoint
from endor.errors import (
    CheckpointError,
    ConfigError,
    DTypeError,
    EndorError,
    EndorWarning,
    OutputExistsError,
    PruningError,
)
from endor.packing import pack_checkpoint, prune_checkpoint
from endor.pruning.contract import PruneOptions
from endor.pruning.methods.magnitude import Magnitude
from endor.quantization import QuantizeOptions
from endor.storage import FileLayout

from .conftest import (
    COMPANIONS,
    CONFIG,
    assert_same_tensors,
    make_old,
    read_bits,
    weight,
    write_checkpoint,
)

MIB = 1 << 20


@pytest.mark.parametrize("codec", ["auto", "raw", "exp", "dense"])
def test_round_trip(tmp_path, model, state, codec):
    report = pack_checkpoint(model, tmp_path / "packed", codec=codec)
    assert verify_checkpoint(tmp_path / "packed", against=model).problems == ()
    with closing(open_source(tmp_path / "packed")) as source:
        assert_same_tensors(source, state)
    rows = {row.name: row.spec for row in inspect_checkpoint(tmp_path / "packed").rows}
    assert rows["model.layers.0.mlp.up_proj.weight"].codec == ("exp" if codec == "auto" else codec)
    assert rows["model.embed_tokens.weight"].codec == "dense"
    assert report.sizes.tensors == len(state)
    assert report.sizes.packed_tensors == (0 if codec == "dense" else 31)
    assert report.sizes.dense_bytes == sum(t.numel() * t.element_size() for t in state.values())
    shards = list((tmp_path / "packed").glob("*.safetensors"))
    assert report.sizes.packed_bytes == sum(path.stat().st_size for path in shards)


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
@pytest.mark.parametrize("shards", [1, 3])
def test_unpacking_restores_the_layout(tmp_path, state, content, kind, shards):
    model = write_checkpoint(tmp_path / "m", state, shards=shards, kind=kind)
    pack_checkpoint(model, tmp_path / "packed")
    unpack_checkpoint(tmp_path / "packed", tmp_path / "dense")
    reference = model
    if kind == "bin":
        reference = write_checkpoint(tmp_path / "reference", state, shards=shards)
    expected, found = content(reference), content(tmp_path / "dense")
    index = "model.safetensors.index.json"
    assert found.keys() == expected.keys()
    assert {k: v for k, v in found.items() if k != index} == {
        k: v for k, v in expected.items() if k != index
    }
    if shards > 1:
        weight_maps = [json.loads(files[index])["weight_map"] for files in (found, expected)]
        assert weight_maps[0] == weight_maps[1]


def test_companions_are_carried_over(tmp_path, model):
    (model / "pytorch_model.bin").write_bytes(b"another weight file")
    (model / ".cache").mkdir()
    with pytest.warns(EndorWarning, match=r"leaves alone pytorch_model\.bin"):
        pack_checkpoint(model, tmp_path / "packed", prune="magnitude", sparsity=0.25)
    for name, text in COMPANIONS.items():
        assert (tmp_path / "packed" / name).read_text() == text
    names = {path.name for path in (tmp_path / "packed").iterdir()}
    assert names == {name.split("/")[0] for name in COMPANIONS} | {
        "config.json",
        "endor.safetensors.index.json",
        "endor-00001-of-00001.safetensors",
    }
    config = json.loads((tmp_path / "packed" / "config.json").read_text())
    assert config.pop("quantization_config") == {
        "quant_method": "endor",
        "format_version": 1,
        "codec": "auto",
        "prune": {
            "method": "magnitude",
            "sparsity": 0.25,
            "pattern": "unstructured",
            "group": "matrix",
        },
    }
    assert config == CONFIG


def test_a_quantization_of_the_source_survives(tmp_path, model):
    fp8 = {"quant_method": "fp8"}
    (model / "config.json").write_text(json.dumps(CONFIG | {"quantization_config": fp8}))
    pack_checkpoint(model, tmp_path / "packed")
    config = json.loads((tmp_path / "packed" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "endor"
    assert config["quantization_config"]["source_quantization_config"] == fp8
    unpack_checkpoint(tmp_path / "packed", tmp_path / "dense")
    dense = json.loads((tmp_path / "dense" / "config.json").read_text())
    assert dense["quantization_config"] == fp8


def test_quantized_weights_are_not_pruned(tmp_path, model):
    fp8 = {"quant_method": "fp8"}
    (model / "config.json").write_text(json.dumps(CONFIG | {"quantization_config": fp8}))
    for convert in (pack_checkpoint, prune_checkpoint):
        with pytest.raises(PruningError, match=r"quantized \(fp8\).*scales"):
            convert(model, tmp_path / "out", prune="magnitude")
        assert not (tmp_path / "out").exists()


def test_a_lone_file(tmp_path, state):
    save_file(state, tmp_path / "weights.safetensors", metadata={"format": "pt"})
    pack_checkpoint(tmp_path / "weights.safetensors", tmp_path / "packed")
    assert not (tmp_path / "packed" / "config.json").exists()
    unpack_checkpoint(tmp_path / "packed", tmp_path / "dense")
    found = tmp_path / "dense" / "weights.safetensors"
    assert found.read_bytes() == (tmp_path / "weights.safetensors").read_bytes()
    assert [path.name for path in (tmp_path / "dense").iterdir()] == [found.name]


def test_records_in_execution_order(tmp_path, model):
    pack_checkpoint(model, tmp_path / "packed")
    layout = FileLayout.read(tmp_path / "packed" / "endor-00001-of-00001.safetensors")
    names = list(layout.records)
    layers = [int(name.split(".")[2]) for name in names if name.startswith("model.layers.")]
    assert layers == sorted(layers)
    assert names.index("model.embed_tokens.weight") < names.index("model.layers.0.small")
    assert names[-2:] == ["model.norm.weight", "lm_head.weight"]
    experts = layout.records["model.layers.10.block_sparse_moe.experts.11"].tensors
    assert [name.split(".")[-2] for name in experts] == ["w1", "w3", "w2"]


@pytest.mark.parametrize("threads", [1, 4])
def test_bytes_do_not_depend_on_threads(tmp_path, large_model, content, threads):
    pack_checkpoint(large_model, tmp_path / "a", prune="magnitude", threads=2)
    pack_checkpoint(large_model, tmp_path / "b", prune="magnitude", threads=threads)
    assert content(tmp_path / "a") == content(tmp_path / "b")


def test_shards(tmp_path, large_model):
    report = pack_checkpoint(large_model, tmp_path / "packed", max_shard_bytes=2 * MIB)
    shards = sorted((tmp_path / "packed").glob("*.safetensors"))
    assert report.sizes.shards == len(shards) > 2
    assert [path.name for path in shards] == [
        f"endor-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))
    ]
    assert all(path.stat().st_size <= 2 * MIB for path in shards)
    index = json.loads((tmp_path / "packed" / "endor.safetensors.index.json").read_text())
    stored = {}
    for path in shards:
        with safe_open(path, framework="np") as file:
            keys = set(file.offset_keys())
        stored |= {key: path.name for key in keys if not key.startswith("__pad__")}
    assert index["weight_map"] == stored
    assert verify_checkpoint(tmp_path / "packed", against=large_model).ok


def test_include_and_exclude(tmp_path, model):
    pack_checkpoint(
        model, tmp_path / "packed", codec="raw", include=["lm_head"], exclude=["re:layers.2."]
    )
    rows = {row.name: row.spec for row in inspect_checkpoint(tmp_path / "packed").rows}
    assert rows["lm_head.weight"].codec == "raw"
    assert rows["model.layers.2.mlp.up_proj.weight"].codec == "dense"
    assert rows["model.layers.0.mlp.up_proj.weight"].codec == "raw"


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_magnitude(tmp_path, model, state, pattern):
    report = pack_checkpoint(
        model, tmp_path / "packed", prune="magnitude", sparsity=0.6, pattern=pattern
    )
    if pattern == "2:4":
        assert 0.45 < report.sizes.density <= 0.5  # some groups had more zeros before
    else:
        assert report.sizes.density == pytest.approx(0.4, abs=1e-4)
    pruner = Magnitude(PruneOptions(method="magnitude", sparsity=0.6, pattern=pattern))
    rows = {row.name: row.spec for row in inspect_checkpoint(tmp_path / "packed").rows}
    with closing(open_source(tmp_path / "packed")) as source:
        for name, tensor in state.items():
            packed = rows[name].codec != "dense"
            want = pruner.prune(name, tensor) if packed else tensor
            want_bits = want.reshape(-1).view(torch.uint8).numpy() if want.numel() else []
            assert np.array_equal(read_bits(source, name), want_bits), name


class Halver:
    """A pruner that knows torch only."""

    def prune(self, name, weight):
        out = weight.clone()
        out[..., ::2] = 0
        return out


class Wrong:
    def prune(self, name, weight):
        return weight.float()


def test_own_pruner(tmp_path, model):
    report = pack_checkpoint(model, tmp_path / "packed", prune=Halver())
    assert report.sizes.density <= 0.5
    config = json.loads((tmp_path / "packed" / "config.json").read_text())
    assert config["quantization_config"]["prune"] == {"method": "halver"}
    with pytest.raises(PruningError, match=r"must return torch\.bfloat16"):
        pack_checkpoint(model, tmp_path / "wrong", prune=Wrong())
    assert not list(tmp_path.glob("wrong*"))


class LayerByLayer:
    """A source with state: it must be asked from one thread, in execution order."""

    ordered = True

    def __init__(self, source):
        self.source = source
        self.asked = []
        self.path, self.directory, self.tensors = source.path, source.directory, source.tensors
        self.config, self.fingerprint = source.config, source.fingerprint

    def read_into(self, name, out):
        import threading

        assert threading.current_thread() is threading.main_thread()
        self.asked.append(name)
        self.source.read_into(name, out)
        if name.endswith("up_proj.weight"):
            out[:] = 0

    def close(self):
        raise AssertionError("a source is closed by who opened it")


def test_ordered_source(tmp_path, model):
    with closing(open_source(model)) as plain:
        source = LayerByLayer(plain)
        pack_checkpoint(source, tmp_path / "packed", description={"method": "mine"}, threads=3)
    names = [row.name for row in inspect_checkpoint(tmp_path / "packed").rows]
    assert source.asked == names
    rows = {row.name: row.spec for row in inspect_checkpoint(tmp_path / "packed").rows}
    assert rows["model.layers.0.mlp.up_proj.weight"].nnz == 0
    config = json.loads((tmp_path / "packed" / "config.json").read_text())
    assert config["quantization_config"]["prune"] == {"method": "mine"}


def test_options_that_make_no_sense(tmp_path, model):
    out = tmp_path / "out"
    with pytest.raises(ConfigError, match="prune: must be none or one of"):
        pack_checkpoint(model, out, prune="nothing")
    with pytest.raises(ConfigError, match="need calibration text"):
        pack_checkpoint(model, out, quality=0.1, calibrate=False)
    with pytest.raises(ConfigError, match="take codec int"):
        pack_checkpoint(model, out, quantize=QuantizeOptions(), codec="raw")
    with pytest.raises(ConfigError, match="max_shard_bytes"):
        pack_checkpoint(model, out, max_shard_bytes=1000)
    with pytest.raises(ConfigError, match="nothing to prune"):
        pack_checkpoint(model, out, prune="magnitude", exclude=["*"])
    with pytest.raises(PruningError, match="only matrices"):
        pack_checkpoint(model, out, prune="magnitude", include=["model.norm"])
    integers = tmp_path / "u8.safetensors"
    save_file({"layers.0.weight": torch.ones(64, 64, dtype=torch.uint8)}, integers)
    with pytest.raises(DTypeError, match="cannot prune U8"):
        pack_checkpoint(integers, out, prune="magnitude")
    assert not list(tmp_path.glob("out*"))


def test_colliding_names(tmp_path, state):
    state["model.layers.0.mlp.up_proj.weight_bitmap"] = torch.ones(1)
    model = write_checkpoint(tmp_path / "m", state)
    with pytest.raises(CheckpointError, match="collides with an array"):
        pack_checkpoint(model, tmp_path / "out")


def test_existing_output(tmp_path, model, content):
    out = tmp_path / "out"
    out.mkdir()
    pack_checkpoint(model, out)  # an empty directory is no output
    before = content(out)
    with pytest.raises(OutputExistsError, match=r"exists already.*--overwrite"):
        pack_checkpoint(model, out)
    with pytest.raises(OutputExistsError, match="exists already"):
        pack_checkpoint(model, out, resume=True)
    assert content(out) == before
    pack_checkpoint(model, out, overwrite=True, codec="raw")
    assert content(out) != before
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("out")] == ["out"]


def test_the_input_is_not_replaced(tmp_path, model):
    for target in (model, tmp_path):
        with pytest.raises(CheckpointError, match="holds the input"):
            pack_checkpoint(model, target, overwrite=True)
    other = tmp_path / "photos"
    other.mkdir()
    (other / "cat.jpg").write_bytes(b"meow")
    with pytest.raises(OutputExistsError, match="holds no checkpoint"):
        pack_checkpoint(model, other, overwrite=True)
    with pytest.raises(OutputExistsError, match="is no directory"):
        pack_checkpoint(model, other / "cat.jpg", overwrite=True)


def stop_after(nbytes, error):
    def progress(done, total):
        if done >= nbytes:
            raise error

    return progress


def test_interrupted_and_resumed(tmp_path, large_model, content):
    options = {"prune": "magnitude", "max_shard_bytes": MIB}
    whole, out = tmp_path / "whole", tmp_path / "out"
    pack_checkpoint(large_model, whole, **options)
    with pytest.raises(KeyboardInterrupt):
        pack_checkpoint(
            large_model, out, progress=stop_after(4 * MIB, KeyboardInterrupt()), **options
        )
    assert not out.exists()
    partial = tmp_path / "out.partial"
    assert {path.name for path in partial.iterdir()} == {"content", "journal.jsonl"}
    kept = sorted(path.name for path in (partial / "content").iterdir())
    assert len(kept) > 1
    assert all(name.endswith(".safetensors") for name in kept)
    with pytest.raises(OutputExistsError, match="--resume"):
        pack_checkpoint(large_model, out, **options)
    with pytest.raises(CheckpointError, match="max_shard_bytes was 1048576 and is now"):
        pack_checkpoint(large_model, out, resume=True, prune="magnitude")
    calls = []
    report = pack_checkpoint(
        large_model, out, resume=True, progress=lambda *call: calls.append(call), **options
    )
    assert report.resumed_shards == len(kept)
    assert calls[0][0] > 0
    assert calls[-1][0] == calls[-1][1] == report.sizes.dense_bytes
    assert report.converted_bytes == calls[-1][1] - calls[0][0]
    assert content(out) == content(whole)
    assert not partial.exists()


def test_resume_without_anything_to_resume(tmp_path, model):
    assert pack_checkpoint(model, tmp_path / "out", resume=True).resumed_shards == 0


def test_resume_after_the_source_changed(tmp_path, large_model):
    with pytest.raises(KeyboardInterrupt):
        pack_checkpoint(
            large_model,
            tmp_path / "out",
            max_shard_bytes=MIB,
            progress=stop_after(4 * MIB, KeyboardInterrupt()),
        )
    os.utime(large_model / "model-00002-of-00004.safetensors", ns=(1, 1))
    with pytest.raises(CheckpointError, match="cannot be resumed: source was"):
        pack_checkpoint(large_model, tmp_path / "out", max_shard_bytes=MIB, resume=True)
    report = pack_checkpoint(large_model, tmp_path / "out", max_shard_bytes=MIB, overwrite=True)
    assert report.resumed_shards == 0


def test_resume_with_a_damaged_shard(tmp_path, large_model):
    with pytest.raises(KeyboardInterrupt):
        pack_checkpoint(
            large_model,
            tmp_path / "out",
            max_shard_bytes=MIB,
            progress=stop_after(4 * MIB, KeyboardInterrupt()),
        )
    path = tmp_path / "out.partial" / "content" / "endor-00001.safetensors"
    content = bytearray(path.read_bytes())
    content[-5000] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"checksum must be .* start again with --overwrite"):
        pack_checkpoint(large_model, tmp_path / "out", max_shard_bytes=MIB, resume=True)


def interrupt(source, out, **options):
    with pytest.raises(KeyboardInterrupt):
        pack_checkpoint(
            source,
            out,
            max_shard_bytes=MIB,
            progress=stop_after(4 * MIB, KeyboardInterrupt()),
            **options,
        )


def test_packing_never_deletes_its_source(tmp_path, large_model, content):
    """`endor pack m.partial m`, which emptied the model, and all of its relatives."""
    source = large_model.rename(tmp_path / "m.partial")
    before = content(tmp_path)
    for convert in (pack_checkpoint, prune_checkpoint):
        for options in ({}, {"overwrite": True}, {"resume": True}):
            with pytest.raises(CheckpointError, match="holds the input"):
                convert(source, tmp_path / "m", **options)
            assert content(tmp_path) == before


@pytest.mark.parametrize("convert", ["pack", "prune", "unpack"])
def test_a_folder_that_is_called_partial_survives(tmp_path, model, content, convert):
    pack_checkpoint(model, tmp_path / "packed")
    (tmp_path / "o.partial").mkdir()
    (tmp_path / "o.partial" / "thesis.txt").write_text("mine")
    before = content(tmp_path)
    run = {"pack": pack_checkpoint, "prune": prune_checkpoint, "unpack": unpack_checkpoint}
    source = tmp_path / "packed" if convert == "unpack" else model
    for options in ({}, {"overwrite": True}, {"resume": True}):
        with pytest.raises(OutputExistsError, match=r"o\.partial.*thesis\.txt"):
            run[convert](source, tmp_path / "o", **options)
    assert content(tmp_path) == before


def edit_journal(partial, change):
    path = partial / "journal.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    change(lines)
    text = "".join(json.dumps(line, separators=(",", ":")) + "\n" for line in lines)
    path.write_text(text)


PLANTED = ["../precious", "/etc/hostname", "precious", ".", "", None, 5, ["a"], "a\0b"]
PLANTED += ["endor-00002.safetensors", "sub/endor-00001.safetensors"]
PLANTED += ["endor-00001-of-00009.safetensors"]


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_name_is_refused(tmp_path, large_model, content, name):
    """The journal cannot make Endor touch another file."""
    (tmp_path / "precious").write_text("mine")
    interrupt(large_model, tmp_path / "out")

    def plant(lines):
        next(line for line in lines if "file" in line)["file"] = name

    edit_journal(tmp_path / "out.partial", plant)
    before = content(tmp_path)
    with pytest.raises(EndorError):
        pack_checkpoint(large_model, tmp_path / "out", max_shard_bytes=MIB, resume=True)
    after = content(tmp_path)
    assert after["precious"] == b"mine"
    assert not (tmp_path / "out").exists()
    assert before.keys() >= after.keys()


@pytest.mark.parametrize("kind", ["shard", "link", "hole"])
def test_a_planted_shard_is_refused(tmp_path, large_model, kind):
    """Whole in itself and of the right records, but not the one that was finished."""
    interrupt(large_model, tmp_path / "out")
    interrupt(large_model, tmp_path / "other", prune="magnitude")
    path = tmp_path / "out.partial" / "content" / "endor-00001.safetensors"
    other = tmp_path / "other.partial" / "content" / "endor-00001.safetensors"
    path.unlink()
    if kind == "shard":
        path.write_bytes(other.read_bytes())
    elif kind == "link":
        path.symlink_to(other)
    with pytest.raises(CheckpointError, match=r"was changed|is missing|did not write"):
        pack_checkpoint(large_model, tmp_path / "out", max_shard_bytes=MIB, resume=True)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("last", [False, True])
def test_killed_while_shards_get_their_names(tmp_path, large_model, content, last, monkeypatch):
    """Some have a count in their name and some do not; one is not to be taken twice."""
    from endor.checkpoint import convert

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(convert, "build_index", stop)
    with pytest.raises(KeyboardInterrupt):
        pack_checkpoint(large_model, tmp_path / "out", max_shard_bytes=MIB)
    monkeypatch.undo()
    names = sorted((tmp_path / "out.partial" / "content").glob("endor-*"))
    assert all("-of-" in path.name for path in names)
    if not last:
        names[1].rename(names[1].with_name("endor-00002.safetensors"))
    report = pack_checkpoint(large_model, tmp_path / "out", max_shard_bytes=MIB, resume=True)
    assert report.resumed_shards == len(names)
    assert report.converted_bytes == 0
    pack_checkpoint(large_model, tmp_path / "whole", max_shard_bytes=MIB)
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_a_companion_that_is_gone_is_not_published_later(tmp_path, large_model, monkeypatch):
    (large_model / "old.txt").write_text("old")
    from endor.checkpoint import convert

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(convert, "build_index", stop)
    with pytest.raises(KeyboardInterrupt):
        pack_checkpoint(large_model, tmp_path / "out", max_shard_bytes=MIB)
    monkeypatch.undo()
    (large_model / "old.txt").unlink()
    pack_checkpoint(large_model, tmp_path / "out", max_shard_bytes=MIB, resume=True)
    assert not (tmp_path / "out" / "old.txt").exists()
    assert verify_checkpoint(tmp_path / "out", against=large_model).ok


def test_strangers_are_not_replaced(tmp_path, model, content):
    """The index lists what was published: a file added since, a usual one too, is not Endor's."""
    out = tmp_path / "out"
    pack_checkpoint(model, out)
    for name in ("notes.txt", "merges.txt", "src/a.py", "model.safetensors"):
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_text("mine")
        before = content(out)
        with pytest.raises(OutputExistsError, match=f"holds {name}, which Endor did not write"):
            pack_checkpoint(model, out, overwrite=True, codec="raw")
        assert content(out) == before
        (out / name).unlink()
        if (out / "src").exists():
            (out / "src").rmdir()
    (out / "LICENSE").unlink()  # less than was published is fine
    pack_checkpoint(model, out, overwrite=True, codec="raw")
    assert verify_checkpoint(out, against=model).ok


def test_dense_outputs_and_old_packed_ones_are_replaced_by_their_names(tmp_path, model, content):
    pack_checkpoint(model, tmp_path / "packed")
    unpack_checkpoint(tmp_path / "packed", tmp_path / "dense")
    for _ in range(2):
        unpack_checkpoint(tmp_path / "packed", tmp_path / "dense", overwrite=True)
    make_old(tmp_path / "packed")
    with pytest.warns(EndorWarning, match="no checksums of shards"):
        verify_checkpoint(tmp_path / "packed")
    pack_checkpoint(model, tmp_path / "packed", overwrite=True)
    (tmp_path / "dense" / "src").mkdir()
    with pytest.raises(OutputExistsError, match="holds src/, which Endor did not write"):
        unpack_checkpoint(tmp_path / "packed", tmp_path / "dense", overwrite=True)


KILLED = """
import os, signal, sys
from endor.packing import pack_checkpoint
def progress(done, total):
    if done >= int(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)
pack_checkpoint(sys.argv[1], sys.argv[2], max_shard_bytes=1 << 20, progress=progress)
"""


@pytest.mark.parametrize("nbytes", [1, 3 * MIB, 8 * MIB])
def test_killed_and_resumed(tmp_path, large_model, content, nbytes):
    out = tmp_path / "out"
    command = [sys.executable, "-c", KILLED, str(large_model), str(out), str(nbytes)]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    assert not out.exists()
    report = pack_checkpoint(large_model, out, max_shard_bytes=MIB, resume=True)
    assert (report.resumed_shards > 0) == (nbytes > MIB)
    pack_checkpoint(large_model, tmp_path / "whole", max_shard_bytes=MIB)
    assert content(out) == content(tmp_path / "whole")
    assert not list(tmp_path.glob("out.*"))


def test_a_disk_that_fills_up(tmp_path, large_model):
    """A write that fails names its file, keeps what is complete and can be resumed."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (MIB, hard))
    try:
        with pytest.raises(OSError, match="File too large") as caught:
            pack_checkpoint(large_model, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert "endor-00001" in str(caught.value.filename)
    assert not list(tmp_path.glob("out*"))


def test_empty_checkpoint(tmp_path):
    (tmp_path / "m").mkdir()
    save_file({}, tmp_path / "m" / "model.safetensors")
    with pytest.raises(CheckpointError, match="holds no tensors"):
        pack_checkpoint(tmp_path / "m", tmp_path / "out")


def test_repacking(tmp_path, model, content):
    """A packed checkpoint is an input like any other."""
    pack_checkpoint(model, tmp_path / "exp")
    pack_checkpoint(tmp_path / "exp", tmp_path / "raw", codec="raw")
    pack_checkpoint(model, tmp_path / "direct", codec="raw")
    assert content(tmp_path / "raw") == content(tmp_path / "direct")


def test_stored_type_of_each_dtype(tmp_path, packable):
    torch_types = {
        "BF16": torch.bfloat16,
        "F16": torch.float16,
        "F32": torch.float32,
        "F8_E4M3": torch.float8_e4m3fn,
        "F8_E5M2": torch.float8_e5m2,
        "I8": torch.int8,
        "U8": torch.uint8,
    }
    kind = torch_types[packable.name]
    tensor = weight(128, 64, dtype=torch.float32).nan_to_num(0, 1, -1)
    tensor = (tensor * 100).to(kind) if not kind.is_floating_point else tensor.to(kind)
    save_file({"layers.0.fc.weight": tensor}, tmp_path / "x.safetensors")
    pack_checkpoint(tmp_path / "x.safetensors", tmp_path / "packed")
    (row,) = inspect_checkpoint(tmp_path / "packed").rows
    assert row.spec.dtype is packable
    assert row.spec.codec != "dense"
    assert verify_checkpoint(tmp_path / "packed", against=tmp_path / "x.safetensors").ok
