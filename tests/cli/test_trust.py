"""A checkpoint with its own code: refused wherever a model is built, and never asked about."""

import json
import shutil

import pytest
import torch
import transformers
from click.testing import CliRunner
from tokenizers import Tokenizer, models, pre_tokenizers

import endor
from endor.cli.main import cli
from endor.errors import ConfigError
from endor.planning import machine as hardware

CODE = """
from transformers import LlamaConfig, LlamaForCausalLM


class OwnConfig(LlamaConfig):
    model_type = "own"


class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""
CALIBRATION = ["--samples", "2", "--seq-len", "8", "--calibration", "TEXT"]
COMMANDS = {
    "generate": ["generate", "PACKED", "--prompt", "w3", "--max-new-tokens", "2"],
    "generate dense": ["generate", "MODEL", "--prompt", "w3", "--max-new-tokens", "2"],
    "plan": ["plan", "PACKED"],
    "eval": ["eval", "PACKED", "--text", "TEXT", "--window", "8", "--max-windows", "1"],
    "bench": ["bench", "generate", "PACKED", "--ram", "1GiB", "--rounds", "1", "--tokens", "2"],
    "pack": ["pack", "MODEL", "OUT", "--prune", "wanda", *CALIBRATION],
    "prune": ["prune", "MODEL", "OUT", "--method", "wanda", *CALIBRATION],
    "quantize": ["quantize", "MODEL", "OUT", "--bits", "4", *CALIBRATION],
}


@pytest.fixture(scope="module")
def coded(tmp_path_factory):
    """A tiny model of an architecture that only its own code knows, dense and packed."""
    root = tmp_path_factory.mktemp("coded")
    words = Tokenizer(models.WordLevel({f"w{at}": at for at in range(100)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=100,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
    )
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    path = root / "model"
    model.save_pretrained(path)
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0").save_pretrained(
        path
    )
    members = json.loads((path / "config.json").read_text())
    members |= {
        "model_type": "own",
        "architectures": ["OwnModel"],
        "auto_map": {
            "AutoConfig": "own.OwnConfig",
            "AutoModel": "own.Other",
            "AutoModelForCausalLM": "own.OwnModel",
        },
    }
    (path / "config.json").write_text(json.dumps(members))
    (path / "own.py").write_text(CODE)
    (root / "text").write_text(" ".join(f"w{at * 7 % 100}" for at in range(300)))
    endor.pack_checkpoint(path, root / "packed", threads=1)
    return root


@pytest.fixture
def run(coded, tmp_path, monkeypatch):
    """Return a function that runs a command of `COMMANDS`."""
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked on the terminal"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(hardware, "measure", hardware.typical)
    monkeypatch.setattr(hardware, "disk", lambda path, **options: hardware.TYPICAL_DISK)
    places = {"MODEL": coded / "model", "PACKED": coded / "packed", "TEXT": coded / "text"}
    places["OUT"] = tmp_path / "out"

    def invoke(name, *more):
        words = [str(places.get(word, word)) for word in (*COMMANDS[name], *more)]
        return CliRunner().invoke(cli, words)

    return invoke


@pytest.mark.parametrize("name", COMMANDS)
def test_refused_unless_trusted(run, coded, tmp_path, name):
    refused = run(name)
    assert isinstance(refused.exception, ConfigError)
    assert "needs Python code that comes with the checkpoint" in str(refused.exception)
    assert "--trust-remote-code" in str(refused.exception)
    assert not (tmp_path / "out").exists()
    trusted = run(name, "--trust-remote-code")
    assert trusted.exit_code == 0, (trusted.output, trusted.exception)


def test_pack_says_that_it_carries_code(run, coded, tmp_path):
    words = ["pack", str(coded / "model"), str(tmp_path / "packed")]
    said = CliRunner().invoke(cli, words)
    assert said.exit_code == 0
    assert "carried over unread: Python code of the checkpoint (own.py)" in said.stderr
    assert (tmp_path / "packed" / "own.py").read_text() == CODE
    shutil.rmtree(tmp_path / "packed")
    said = CliRunner().invoke(cli, [*words, "--json"])
    assert json.loads(said.stdout)["code"] == ["own.py"]


def test_a_class_that_transformers_has_wins_without_trust(coded, tmp_path):
    """The code is for other versions of transformers; it does not run, and is not asked about."""
    path = tmp_path / "known"
    shutil.copytree(coded / "packed", path)
    members = json.loads((path / "config.json").read_text())
    members |= {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    (path / "config.json").write_text(json.dumps(members))
    assert type(endor.load_model(path)).__module__.startswith("transformers.")
    assert type(endor.load_model(path, trust_remote_code=True)).__name__ == "OwnModel"
