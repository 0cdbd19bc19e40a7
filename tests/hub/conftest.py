"""A Hub on this machine, and what huggingface_hub must be told to use it."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.support.hub import FakeHub

pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed")

from huggingface_hub import constants

CONFIG = {"model_type": "llama", "torch_dtype": "bfloat16", "vocab_size": 100}


def weights(layers: int = 4) -> dict[str, torch.Tensor]:
    """Return matrices of a model of so many layers, in execution order."""
    generator = torch.Generator().manual_seed(0)

    def matrix(*shape: int) -> torch.Tensor:
        return (torch.randn(shape, generator=generator) * 0.05).to(torch.bfloat16)

    state = {"model.embed_tokens.weight": matrix(100, 64)}
    for layer in range(layers):
        for name in ("q", "k", "v", "o"):
            state[f"model.layers.{layer}.self_attn.{name}_proj.weight"] = matrix(256, 256)
        state[f"model.layers.{layer}.input_layernorm.weight"] = matrix(64)
    return state | {"model.norm.weight": matrix(64)}


def write_model(folder: Path, *, shards: int = 4) -> Path:
    """Write a checkpoint of so many shards, with what lies beside it, and what is not its own."""
    folder.mkdir(parents=True)
    state = weights()
    names = list(state)
    weight_map = {}
    for number in range(shards):
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        part = names[number * len(names) // shards : (number + 1) * len(names) // shards]
        save_file({name: state[name] for name in part}, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "tokenizer.json").write_text("{}")
    (folder / "LICENSE").write_text("free")
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n# A model\n")
    return folder


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeHub]:
    """A fake Hub that huggingface_hub of this process talks to, with an empty cache."""
    found = FakeHub()
    monkeypatch.setattr(constants, "ENDPOINT", found.url)
    template = found.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr("huggingface_hub.hf_api.ENDPOINT", found.url, raising=False)
    monkeypatch.setattr("endor.hub.client.time.sleep", lambda seconds: None)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.chdir(tmp_path)
    yield found
    found.shutdown()
    found.server_close()


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_model(tmp_path / "local")
