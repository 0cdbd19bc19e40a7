"""What a checkpoint may not decide, and what it may not do, when it is loaded."""

import json
import os
import shutil
import threading
import warnings
from contextlib import nullcontext, suppress

import pytest
import torch
from transformers import AutoModelForCausalLM

import endor
from endor.errors import BackendError, ChecksumError, ConfigError, EndorError, IntegrityError
from endor.hf import EndorConfig
from endor.models.outline import outline

from .conftest import least

LOADER = {
    "ram": 1,
    "exact": False,
    "verify": False,
    "reader": "tape",
    "threads": -1,
    "placement": 3,
    "vram": "x",
    "context": 0,
    "prompt": 0,
    "batch": 0,
    "measure": True,
    "kv": "tape",
}
"""Every option of loading, with a value that would be noticed."""


def load(path, **options):
    return AutoModelForCausalLM.from_pretrained(path, **options)


def edited(pair, folder, **changes):
    """Return a copy of a packed checkpoint with other members in config.json."""
    shutil.copytree(pair.packed, folder)
    config = json.loads((folder / "config.json").read_text())
    for key, value in changes.items():
        (config["quantization_config"] if key in LOADER else config)[key] = value
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("call", [load, endor.load_model], ids=["from_pretrained", "load_model"])
def test_a_checkpoint_sets_no_loader_option(pair, tmp_path, call, monkeypatch):
    """Only the caller says how it is loaded and checked."""
    path = edited(pair, tmp_path / "sly", **LOADER)

    def measured(*_, **__):
        pytest.fail("nobody asked to measure")

    monkeypatch.setattr("endor.planning.machine.machine", measured)
    model = call(path)
    pair.check(model)
    model.save_pretrained(tmp_path / "again")
    saved = json.loads((tmp_path / "again" / "config.json").read_text())["quantization_config"]
    assert not set(saved) & set(LOADER)
    unit = model.endor.units[0]
    with unit.record.path.open("r+b") as file:
        file.seek(unit.record.offset + 100)
        byte = file.read(1)
        file.seek(unit.record.offset + 100)
        file.write(bytes([byte[0] ^ 1]))
    with pytest.raises(ChecksumError):
        call(path).endor.preload()


@pytest.mark.parametrize("threads", [0, -1, 257, 100_000, True, 1.5, "2"])
def test_threads_out_of_range(pair, threads):
    with pytest.raises(ConfigError, match=r"threads must be an integer in 1\.\.256"):
        endor.load_model(pair.packed, threads=threads)
    config = EndorConfig()
    config.threads = threads
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # transformers tells which attributes it overwrites
        with pytest.raises(ConfigError, match=r"threads must be an integer in 1\.\.256"):
            load(pair.packed, quantization_config=config)


@pytest.mark.parametrize("wrong", ["pipeline", 5, None, "logging", "no such", "AutoConfig", ["x"]])
def test_architectures_that_are_no_model(pair, tmp_path, wrong):
    """The automatic class takes over, or transformers itself minds what is no text."""
    path = edited(pair, tmp_path / "odd", architectures=[wrong])
    for call in (endor.load_model, outline):
        with nullcontext() if isinstance(wrong, str) else suppress(ConfigError):
            call(path)


@pytest.mark.parametrize(
    "changes",
    [
        {"model_type": "nobody"},
        {"model_type": None},
        {"hidden_size": "wide"},
        {"num_attention_heads": 0},
        {"num_hidden_layers": {}},
        {"architectures": 3, "model_type": [1]},
    ],
    ids=str,
)
def test_a_config_that_transformers_does_not_take(pair, tmp_path, changes):
    path = edited(pair, tmp_path / "odd", **changes)
    for call in (endor.load_model, outline):
        with pytest.raises(EndorError) as error:
            call(path)
        assert "\n" not in str(error.value)
        assert str(path) in str(error.value)


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"weight_map": 3}', "[" * 100_000, "\0"], ids=["empty", *"abcde"]
)
def test_a_malformed_index_is_found_before_transformers_reads_it(pair, tmp_path, text):
    path = edited(pair, tmp_path / "odd")
    (path / "endor.safetensors.index.json").write_text(text)
    for call in (endor.load_model, outline, load):
        with pytest.raises(EndorError):
            call(path)


CODE = """
from transformers import LlamaConfig, LlamaForCausalLM


class OwnConfig(LlamaConfig):
    model_type = "own"


class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""


def test_a_checkpoint_with_code(pair, tmp_path, monkeypatch):
    """Refused without a word from the caller; never asked about."""
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked on the terminal"))
    path = edited(
        pair,
        tmp_path / "coded",
        model_type="own",
        architectures=["OwnModel"],
        auto_map={"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"},
    )
    (path / "own.py").write_text(CODE)
    for call in (endor.load_model, outline):
        with pytest.raises(ConfigError, match="--trust-remote-code"):
            call(path)
    model = endor.load_model(path, trust_remote_code=True)
    assert type(model).__name__ == "OwnModel"
    pair.check(model)
    assert outline(path, trust_remote_code=True).name == "OwnModel"


def test_no_more_threads(pair, monkeypatch):
    started, start = [], threading.Thread.start

    def few(self):
        if self.name.startswith("endor-loader"):
            if started:
                raise RuntimeError("can't start new thread")
            started.append(self)
        start(self)

    monkeypatch.setattr(threading.Thread, "start", few)
    with pytest.raises(BackendError, match="no more than 1 of 2 threads"):
        endor.load_model(pair.packed)
    started[0].join(5)
    assert not started[0].is_alive()


@pytest.mark.parametrize("kind", ["llama", "mixtral"])
@pytest.mark.parametrize("how", ["in place", "replaced"])
def test_a_file_that_changes_while_it_is_streamed(make_pair, tmp_path, kind, how):
    """Another packing of the same shapes over the one that is read from, its time forged."""
    pair, other = make_pair(kind), make_pair(kind, initializer_range=0.3)
    path = tmp_path / "streamed"
    shutil.copytree(pair.packed, path)
    model = endor.load_model(path, ram=least(endor.load_model(path)))
    pair.check(model)
    (shard,) = path.glob("endor-*.safetensors")
    theirs, stamp = (other.packed / shard.name).read_bytes(), shard.stat()
    if how == "replaced":
        (tmp_path / "new").write_bytes(theirs)
        (tmp_path / "new").replace(shard)
    else:
        with shard.open("r+b") as file:
            file.write(theirs[: stamp.st_size].ljust(stamp.st_size, b"\0"))
    os.utime(shard, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    with pytest.raises(IntegrityError, match=r"endor-00001-of-00001.safetensors: record '.*load"):
        pair.logits(model)


def test_a_file_that_moves_is_read_to_the_end(pair, tmp_path):
    path = tmp_path / "streamed"
    shutil.copytree(pair.packed, path)
    model = endor.load_model(path, ram=least(endor.load_model(path)))
    pair.check(model)
    path.rename(tmp_path / "elsewhere")
    pair.check(model)
    assert torch.is_tensor(pair.logits(model))
