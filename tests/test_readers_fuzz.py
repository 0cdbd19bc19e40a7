"""Every reader of a file, fed with mutated and hostile input: an `EndorError`, or an answer.

A new reader is added to `READERS` by one line: how to make a good file, and how to read it.
"""

import json
import random
import shutil
import struct
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import endor
from endor.checkpoint import inspect_checkpoint, open_source
from endor.checkpoint.index import read_packed_index
from endor.checkpoint.loadable import read_config
from endor.checkpoint.output import OutputDirectory
from endor.errors import EndorError
from endor.jsontext import parse
from endor.packing import pack_checkpoint
from endor.pruning.allocation import _from_file
from endor.pruning.calibration import read_documents

MUTATIONS = 60
"""Of each reader's good file, besides the hostile ones; all of them take a few seconds."""

NAME = "model.layers.0.mlp.up_proj.weight"
STATE = {NAME: torch.ones(64, 64, dtype=torch.bfloat16), "flag": torch.tensor([True])}

pytestmark = pytest.mark.filterwarnings("ignore::endor.errors.EndorWarning")


def model(folder: Path, kind: str = "safetensors") -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text('{"model_type": "llama", "hidden_size": 64}')
    if kind == "bin":
        torch.save(STATE, folder / "pytorch_model.bin")
    elif kind == "legacy":
        torch.save(STATE, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    elif kind == "index":
        save_file(STATE, folder / "a.safetensors")
        text = json.dumps({"metadata": {}, "weight_map": dict.fromkeys(STATE, "a.safetensors")})
        (folder / "model.safetensors.index.json").write_text(text)
    elif kind == "bitmask":
        parts = {
            "w.shape": torch.tensor([4, 16]),
            "w.compressed": torch.ones(8),
            "w.bitmask": torch.tensor([[3, 0]] * 4, dtype=torch.uint8),
            "w.row_offsets": torch.tensor([0, 2, 4, 6]),
        }
        save_file(parts, folder / "model.safetensors")
    else:
        save_file(STATE, folder / "model.safetensors")
    return folder


def packed(folder: Path) -> Path:
    pack_checkpoint(model(folder / "dense"), folder / "packed")
    shutil.rmtree(folder / "dense")
    return folder / "packed"


def gguf(folder: Path) -> Path:
    """Write a GGUF file of one value and one tensor of two blocks."""
    key, name = b"general.name", b"blk.0.x"
    head = b"GGUF" + struct.pack("<IQQ", 3, 1, 1)
    head += struct.pack("<Q", len(key)) + key + struct.pack("<IQ", 8, 2) + b"ab"
    head += struct.pack("<Q", len(name)) + name + struct.pack("<IQIQ", 1, 64, 2, 0)
    (folder / "x.gguf").write_bytes(head.ljust(-(-len(head) // 32) * 32, b"\0") + bytes(range(36)))
    return folder


def read_all(path: Path) -> None:
    with closing(open_source(path)) as source:
        source.config()
        for name, tensor in source.tensors.items():
            assert tensor.nbytes < 1 << 24
            source.read_into(name, np.empty(tensor.nbytes, dtype=np.uint8))


def journal(folder: Path) -> Path:
    partial = folder / "out.partial"
    partial.mkdir()
    head = '{"endor journal":1,"a":1}'
    (partial / "journal.jsonl").write_text(f'{head}\n{{"file": "endor-00001.safetensors"}}\n')
    return folder


def resume(folder: Path) -> None:
    place = folder / "out"
    with OutputDirectory(place, identity={"a": 1}, source=folder / "none", resume=True) as output:
        assert all(isinstance(entry, dict) for entry in output.finished)


def written(name: str, text: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        (folder / name).write_text(text, encoding="utf-8")
        return folder

    return make


class Tokenizer:
    def apply_chat_template(self, messages: list[Any], *, tokenize: bool) -> str:
        return str(messages)


def documents(name: str) -> Callable[[Path], None]:
    def read(folder: Path) -> None:
        for text in read_documents(folder / name, Tokenizer(), chat_template=False):
            text.encode()

    return read


INDEX = "model.safetensors.index.json"
LINES = '"one"\n{"text": "two"}\n{"messages": [{"content": "three"}]}\n'
READERS: dict[str, tuple[Callable[[Path], Path], str, Callable[[Path], object]]] = {
    "config": (model, "config.json", read_all),
    "config to load": (model, "config.json", read_config),
    "source header": (model, "model.safetensors", read_all),
    "plain file": (model, "model.safetensors", lambda p: endor.load_file(p / "model.safetensors")),
    "index": (lambda p: model(p, "index"), INDEX, read_all),
    "bin": (lambda p: model(p, "bin"), "pytorch_model.bin", read_all),
    "legacy bin": (lambda p: model(p, "legacy"), "pytorch_model.bin", read_all),
    "bitmask": (lambda p: model(p, "bitmask"), "model.safetensors", read_all),
    "gguf": (gguf, "x.gguf", lambda p: read_all(p / "x.gguf")),
    "packed index": (packed, "endor.safetensors.index.json", read_packed_index),
    "packed config": (packed, "config.json", read_all),
    "packed file": (packed, "endor-00001-of-00001.safetensors", read_all),
    "packed header": (packed, "endor-00001-of-00001.safetensors", inspect_checkpoint),
    "journal": (journal, "out.partial/journal.jsonl", resume),
    "calibration text": (written("c.txt", "some text é"), "c.txt", documents("c.txt")),
    "calibration lines": (written("c.jsonl", LINES), "c.jsonl", documents("c.jsonl")),
    "layer sparsity": (written("l", '{"0": 0.5}'), "l", lambda p: _from_file(p / "l", 0.5, 2)),
}

JSON = [
    b"[" * 100_000,
    b"[" * 100_000 + b"]" * 100_000,
    b'{"a":' * 50_000 + b"1" + b"}" * 50_000,
    b"9" * 5_000,
    b'{"weight_map": {"a": ' + b"9" * 5_000 + b"}}",
    b"1e999",
    b"NaN",
    b'{"\\ud800": "\\ud800"}',
    b'{"weight_map": {"\\ud800": "a.safetensors"}}',
    b'{"weight_map": {"a": "\\u0000"}}',
    b'{"weight_map": {"a\\u0000": "a.safetensors"}}',
    b'{"weight_map": {"a": ["x"]}}',
    b'{"weight_map": []}',
    b'{"architectures": [5], "quantization_config": [], "transformers_weights": {}}',
    b'{"quantization_config": {"quant_method": "endor"}}',
    b'{"metadata": {"endor": {"format_version": 1}}, "weight_map": {}}',
    b'{"metadata": [], "weight_map": {"a": 3}}',
    b'{"metadata": {"endor": {"format_version": 1, "dense_files": [{}], "dense_file_of": {"a": 0},'
    b' "checksum": 3}}, "weight_map": {"a": {}}}',
    b'{"messages": [3, null, {"content": []}]}',
    b'{"text": "\\ud800"}',
    b'{"0": "x", "y": []}',
]


def header(text: bytes, data: bytes = b"") -> bytes:
    return struct.pack("<Q", len(text)) + text + data


HEADERS = [
    header(text, data)
    for text, data in [
        *((text, b"") for text in JSON),
        (b'{"__metadata__":[1]}', b""),
        (b'{"a":{"dtype":[],"shape":[1],"data_offsets":[0,1]}}', b"1"),
        (b'{"a":{"dtype":"U8","shape":[0,4611686018427387904],"data_offsets":[0,0]}}', b""),
        (b'{"a":{"dtype":"F4","shape":[3],"data_offsets":[0,1]}}', b"1"),
        (b'{"a":{"dtype":"U8","shape":[1.0],"data_offsets":[0,1]}}', b"1"),
        (b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[1,0]}}', b"1"),
        (b'{"a":5}', b""),
        (
            b'{"w.bitmask":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},'
            b'"w.compressed":{"dtype":"U8","shape":[],"data_offsets":[1,2]}}',
            b"12",
        ),
        (
            b'{"w.bitmask":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},'
            b'"w.compressed":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},'
            b'"w.shape":{"dtype":"I64","shape":[2],"data_offsets":[0,16]}}',
            struct.pack("<2q", 0, 1 << 62),
        ),
    ]
]
RAW = [b"", b"\0", b"\xff" * 50, b"\xff\xfeh\0i\0", b"GGUF", b"PK\3\4" * 20, b"\x80\2." * 9, b"{"]


TELLING = [b'"', b"{", b"[", b"0", b"-1", b"\\ud800", b"null", b"\n"]


def mutated(good: bytes, dice: random.Random) -> bytes:
    """Return `good` with a few bytes changed, cut out, doubled or swapped for telling ones."""
    raw = bytearray(good)
    for _ in range(dice.randint(1, 4)):
        at = dice.randrange(len(raw) + 1) if dice.random() < 0.5 else dice.randrange(400)
        at = min(at, len(raw))
        kind = dice.randrange(5)
        if kind == 0 and at < len(raw):
            raw[at] = dice.randrange(256)
        elif kind == 1:
            del raw[at : at + dice.randint(1, 20)]
        elif kind == 2:
            raw[at:at] = raw[at : at + dice.randint(1, 20)]
        elif kind == 3:
            raw[at : at + 1] = dice.choice(
                [b'"', b"{", b"[", b"0", b"-1", b"\\ud800", b"null", b"\n"]
            )
        else:
            del raw[dice.randrange(len(raw) + 1) :]
    return bytes(raw)


def outcome(read: Callable[[], object]) -> str:
    """Return the message of the `EndorError` that `read` raises, or nothing."""
    try:
        read()
    except EndorError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("reader", READERS)
def test_readers_raise_endor_errors_only(tmp_path: Path, reader: str) -> None:
    make, name, read = READERS[reader]
    tmp_path.joinpath("place").mkdir()
    place = make(tmp_path / "place")
    good = (place / name).read_bytes()
    read(place)
    dice = random.Random(reader)
    inputs = [*RAW, *JSON, *HEADERS, *(mutated(good, dice) for _ in range(MUTATIONS))]
    for number, content in enumerate(inputs):
        (place / name).parent.mkdir(exist_ok=True)
        (place / name).write_bytes(content)
        message = outcome(lambda: read(place))
        assert len(message) < 2000, f"{reader}, input {number}: {content[:300]!r}"


@pytest.mark.parametrize("content", JSON)
def test_json(content: bytes) -> None:
    for lenient in (False, True):
        message = outcome(
            lambda lenient=lenient: json.dumps(  # type: ignore[misc]
                parse(content, "here", lenient=lenient), ensure_ascii=False
            ).encode()
        )
        assert "\n" not in message
