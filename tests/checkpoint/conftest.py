"""Small Hugging Face checkpoints of every kind, and bitwise comparison of what comes back."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from endor.checkpoint import CheckpointSource
from endor.checkpoint.index import _checksum, index_text

State = dict[str, torch.Tensor]
CONFIG: dict[str, Any] = {"model_type": "llama", "torch_dtype": "bfloat16", "vocab_size": 100}
COMPANIONS = {
    "generation_config.json": '{"do_sample": true}',
    "tokenizer.json": '{"model": {}}',
    "tokenizer_config.json": "{}",
    "special_tokens_map.json": "{}",
    "chat_template.jinja": "{{ messages }}",
    "LICENSE": "free",
    "additional_chat_templates/tool.jinja": "{{ tools }}",
}


def weight(*shape: int, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """Return normal weights, a third of them zero, with a -0.0, a NaN and an Inf at the end."""
    generator = torch.Generator().manual_seed(seed)
    out = torch.randn(shape, generator=generator) * 0.05
    out[torch.rand(shape, generator=generator) < 0.3] = 0
    flat = out.reshape(-1)
    if flat.numel() > 3:
        flat[-3:] = torch.tensor([-0.0, float("nan"), float("inf")])
    return out.to(dtype)


def model_state() -> State:
    """Return a tiny model: layers, one of them with experts, embedding, head, norms, a counter."""
    state: State = {"model.embed_tokens.weight": weight(100, 64, seed=1)}
    for layer in (0, 2, 10):
        prefix = f"model.layers.{layer}"
        for place, name in enumerate(("q", "k", "v", "o")):
            seed = 10 * layer + place
            state[f"{prefix}.self_attn.{name}_proj.weight"] = weight(64, 64, seed=seed)
        state[f"{prefix}.self_attn.q_proj.bias"] = weight(64)
        state[f"{prefix}.input_layernorm.weight"] = weight(64)
        state[f"{prefix}.post_attention_layernorm.weight"] = weight(64)
        for place, (name, rows, cols) in enumerate(
            (("gate", 96, 64), ("up", 96, 64), ("down", 64, 96))
        ):
            state[f"{prefix}.mlp.{name}_proj.weight"] = weight(rows, cols, seed=layer + place)
    state["model.layers.10.mlp.gate.weight"] = weight(64, 64)
    for expert in (0, 1, 11):
        for name in ("w1", "w2", "w3"):
            key = f"model.layers.10.block_sparse_moe.experts.{expert}.{name}.weight"
            state[key] = weight(64, 64, seed=expert)
    state["model.layers.10.mlp.experts.gate_up_proj"] = weight(3, 128, 64, seed=5)
    state["model.norm.weight"] = weight(64)
    state["lm_head.weight"] = weight(100, 64, seed=3)
    state["counter"] = torch.tensor(7)
    state["nothing"] = torch.empty(0, 4, dtype=torch.float16)
    return state


def write_companions(directory: Path, config: Mapping[str, Any] = CONFIG) -> None:
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    for name, text in COMPANIONS.items():
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_text(text)


def write_checkpoint(
    directory: Path, state: State, *, shards: int = 1, kind: str = "safetensors"
) -> Path:
    """Write `state` as a Hugging Face directory of one file, or of shards with an index."""
    directory.mkdir(parents=True)
    write_companions(directory)
    stem, ending = ("model", ".safetensors") if kind == "safetensors" else ("pytorch_model", ".bin")
    names = [f"{stem}-{i + 1:05d}-of-{shards:05d}{ending}" for i in range(shards)]
    names = [f"{stem}{ending}"] if shards == 1 else names
    parts: list[State] = [{} for _ in names]
    for place, (name, tensor) in enumerate(state.items()):
        parts[place * shards // len(state)][name] = tensor
    for name, part in zip(names, parts, strict=True):
        if kind == "safetensors":
            save_file(part, directory / name, metadata={"format": "pt"})
        else:
            torch.save(part, directory / name)
    if shards > 1:
        weight_map = {key: name for name, part in zip(names, parts, strict=True) for key in part}
        index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
        (directory / f"{stem}{ending}.index.json").write_text(json.dumps(index))
    return directory


def edit_index(packed: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change an index and give it the right checksum again, as an attacker would."""
    path = packed / "endor.safetensors.index.json"
    document = json.loads(path.read_text())
    change(document)
    document["metadata"]["endor"]["checksum"] = _checksum(document)
    path.write_bytes(index_text(document))


def make_old(packed: Path) -> None:
    """Give a packed checkpoint the index that older versions wrote."""

    def change(document: dict[str, Any]) -> None:
        del document["metadata"]["endor"]["headers"]
        del document["metadata"]["endor"]["companions"]

    edit_index(packed, change)


def read_bits(source: CheckpointSource, name: str) -> np.ndarray:
    out = np.empty(source.tensors[name].nbytes, dtype=np.uint8)
    source.read_into(name, out)
    return out


def bits_of(tensor: torch.Tensor) -> np.ndarray:
    if not tensor.numel():
        return np.empty(0, dtype=np.uint8)
    bits: np.ndarray = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
    return bits


def assert_same_tensors(source: CheckpointSource, state: Mapping[str, torch.Tensor]) -> None:
    """Fail unless `source` holds exactly `state`, bit for bit."""
    assert source.tensors.keys() == state.keys()
    for name, tensor in state.items():
        assert source.tensors[name].shape == tuple(tensor.shape), name
        assert np.array_equal(read_bits(source, name), bits_of(tensor)), name


@pytest.fixture
def state() -> State:
    return model_state()


@pytest.fixture
def model(tmp_path: Path, state: State) -> Path:
    """A directory with one safetensors file."""
    return write_checkpoint(tmp_path / "model", state)


@pytest.fixture
def large_model(tmp_path: Path) -> Path:
    """A directory with 16 matrices of 512 KiB: several shards of the smallest allowed size."""
    names = [f"model.layers.{layer}.mlp.up_proj.weight" for layer in range(16)]
    tensors = {name: weight(512, 512, seed=seed) for seed, name in enumerate(names)}
    return write_checkpoint(tmp_path / "large", tensors, shards=4)


@pytest.fixture
def content() -> Callable[[Path], dict[str, bytes]]:
    """Return a function that reads every file below a directory."""

    def read(directory: Path) -> dict[str, bytes]:
        return {
            str(path.relative_to(directory)): path.read_bytes()
            for path in sorted(directory.rglob("*"))
            if path.is_file()
        }

    return read
