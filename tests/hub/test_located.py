"""Ids of the Hub wherever a model is taken: what is fetched, and what is said where none is."""

import json
import shutil

import pytest
from huggingface_hub import constants

from endor import inspect_checkpoint, pack_checkpoint, unpack_checkpoint, verify_checkpoint
from endor.checkpoint.located import located
from endor.errors import ConfigError, EndorError, HubError
from endor.hub.names import HubName, hub_name
from tests.support.hub import drop_after, status

SHARDS = [f"model-{number:05d}-of-00004.safetensors" for number in range(1, 5)]


def files(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def unmarked(folder):
    """Return the same of a packed checkpoint, without which model on the Hub it was."""
    found = files(folder)
    config = json.loads(found["config.json"])
    config["quantization_config"].pop("source", None)
    return found | {"config.json": config}


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("org/name", HubName("org/name")),
        ("org/name@main", HubName("org/name", "main")),
        ("Org-1/na.me_2@refs/pr/3", HubName("Org-1/na.me_2", "refs/pr/3")),
        ("name", None),
        ("./org/name", None),
        ("../name", None),
        ("/org/name", None),
        ("a/b/c", None),
        ("org/na--me", None),
        ("org/name.git", None),
        ("org/", None),
        ("org/name/", None),
        ("org/na me", None),
    ],
)
def test_what_is_an_id(text, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert hub_name(text) == name


def test_a_revision(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert hub_name("org/name", "v1") == HubName("org/name", "v1")
    assert hub_name("org/name@v1", "v1") == HubName("org/name", "v1")
    with pytest.raises(ConfigError, match="names revision v1, and v2 was given; give one"):
        hub_name("org/name@v1", "v2")
    with pytest.raises(ConfigError, match="is a path, and a revision"):
        hub_name("folder", "v1")


def test_a_folder_goes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org/name").mkdir(parents=True)
    assert hub_name("org/name") is None
    assert str(located("org/name")) == "org/name"
    with pytest.raises(ConfigError, match="a revision"):
        hub_name("org/name", "v1")
    with pytest.raises(ConfigError, match="goes before the Hub"):
        hub_name("org/name@v1")


def test_everywhere(server, model, tmp_path):
    """Packed by its id, a model is what it is when packed from a folder; and so on."""
    server.add("org/name", model)
    pack_checkpoint(model, tmp_path / "here")
    pack_checkpoint("org/name", tmp_path / "there")
    assert unmarked(tmp_path / "there") == unmarked(tmp_path / "here")
    server.add("org/packed", tmp_path / "here")
    assert inspect_checkpoint("org/packed").sizes.tensors == 22
    assert verify_checkpoint("org/packed", against="org/name").ok
    unpack_checkpoint("org/packed", tmp_path / "dense")
    assert verify_checkpoint(tmp_path / "here", against=tmp_path / "dense").ok


def test_only_what_is_taken(server, model):
    others = ["pytorch_model.bin", "consolidated.safetensors", "model.fp16.safetensors", "x.gguf"]
    for other in [*others, "original/consolidated.00.pth", "onnx/model.onnx", ".gitattributes"]:
        (model / other).parent.mkdir(exist_ok=True)
        (model / other).write_bytes(b"other weights")
    server.add("org/name", model)
    folder = located("org/name")
    assert {path.name for path in folder.iterdir() if path.is_file()} == {
        *("LICENSE", "README.md", "config.json", "model.safetensors.index.json", "tokenizer.json"),
        *SHARDS,
    }
    before = len(server.asked("resolve"))
    assert located("org/name") == folder
    assert len(server.asked("resolve")) == before


def test_without_weights(server, model):
    server.add("org/name", model)
    folder = located("org/name", weights=False)
    assert not list(folder.glob("*.safetensors"))
    assert (folder / "config.json").is_file()


def test_counts_of_neurons_come_along(server, model):
    """A small file that the index of a packed checkpoint names, though it ends as weights do."""
    (model / "endor.neurons.safetensors").write_bytes(b"counts")
    server.add("org/name", model)
    for weights in (False, True):
        folder = located("org/name", weights=weights)
        assert (folder / "endor.neurons.safetensors").read_bytes() == b"counts"


def test_revisions(server, model):
    repository = server.add("org/name", model)
    first = repository.branches["main"]
    (model / "tokenizer.json").write_text('{"new": 1}')
    second = server.add("org/name", model).branches["main"]
    repository.branches["v1"] = first
    assert located("org/name").name == second
    assert located("org/name", revision="v1").name == first
    assert located(f"org/name@{first}").name == first
    assert json.loads((located("org/name") / "tokenizer.json").read_text()) == {"new": 1}
    with pytest.raises(HubError, match=r"^org/name@v9: has no revision v9; see .*/org/name"):
        located("org/name@v9")


def test_a_revision_that_moves(server, model):
    """A branch that moves while it is fetched gives one commit whole, and not two halves."""
    repository = server.add("org/name", model)
    old = repository.branches["main"]

    def move(handler, body):
        files = dict(repository.commits[old])
        files["config.json"] = files["config.json"] + b" "
        repository.commit(files)
        return False

    server.faults["tokenizer.json"].append(move)
    folder = located("org/name")
    assert folder.name == repository.branches["main"] != old
    assert (folder / "config.json").read_bytes().endswith(b" ")


def test_offline(server, model, monkeypatch):
    server.add("org/name", model)
    folder = located("org/name")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert located("org/name") == folder
    with pytest.raises(HubError, match="org/other: is not in the cache, and HF_HUB_OFFLINE"):
        located("org/other")


def test_no_network(server, model, monkeypatch):
    server.add("org/name", model)
    folder = located("org/name")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert located("org/name") == folder
    with pytest.raises(HubError, match=r"^org/other: the Hub cannot be reached") as caught:
        located("org/other")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"token": "secret"}, "neither a folder here nor a model on the Hub that may be seen"),
        ({"token": "secret", "gated": True}, "is gated: accept its licence at http.*set HF_TOKEN"),
    ],
)
def test_no_access(server, model, options, message, monkeypatch):
    server.add("org/name", model, **options)
    with pytest.raises(HubError, match=message) as caught:
        located("org/name")
    assert "\n" not in str(caught.value)
    monkeypatch.setenv("HF_TOKEN", "secret")
    assert (located("org/name") / SHARDS[3]).is_file()


def test_not_there(server, tmp_path):
    for call in (
        lambda: pack_checkpoint("org/name", tmp_path / "out"),
        lambda: inspect_checkpoint("org/name"),
        lambda: verify_checkpoint("org/name"),
        lambda: unpack_checkpoint("org/name", tmp_path / "out"),
    ):
        with pytest.raises(HubError, match="org/name: neither a folder here nor a model"):
            call()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (429, "too many requests"),
        (500, r"the Hub fails \(500\); try again later"),
        (418, r"the Hub refuses \(418\)"),
        (403, r"refuses access \(403\); set HF_TOKEN"),
    ],
)
def test_a_hub_that_refuses(server, model, code, message):
    server.add("org/name", model)
    server.faults["info"] += [status(code)] * 50
    with pytest.raises(HubError, match=message) as caught:
        located("org/name")
    assert "\n" not in str(caught.value)


def test_a_hub_that_is_busy_for_a_while(server, model):
    server.add("org/name", model)
    server.faults["info"] += [status(429, {"Retry-After": "1"}), status(503)]
    assert (located("org/name") / SHARDS[0]).is_file()


def test_a_connection_that_drops(server, model, tmp_path):
    server.add("org/name", model)
    server.faults[SHARDS[1]].append(drop_after(1000))
    pack_checkpoint("org/name", tmp_path / "there")
    pack_checkpoint(model, tmp_path / "here")
    assert unmarked(tmp_path / "there") == unmarked(tmp_path / "here")


def test_an_incomplete_model(server, model):
    (model / SHARDS[2]).unlink()
    server.add("org/name", model)
    with pytest.raises(HubError, match=f"lists {SHARDS[2]}, which the Hub does not have"):
        located("org/name")


def test_no_weights_that_are_taken(server, model):
    for file in [*SHARDS, "model.safetensors.index.json"]:
        (model / file).unlink()
    (model / "model.Q4.gguf").write_bytes(b"GGUF")
    server.add("org/name", model)
    with pytest.raises(HubError, match=r"has no weights .* holds model.Q4.gguf; fetch what"):
        located("org/name")


def test_a_model_of_parts(server, model, tmp_path):
    whole = tmp_path / "pipeline"
    shutil.copytree(model, whole / "unet")
    (whole / "unet/model.fp16.safetensors").write_bytes(b"variant")
    (whole / "unet/pytorch_model.bin").write_bytes(b"the same again")
    (whole / "model_index.json").write_text('{"unet": ["diffusers", "X"]}')
    server.add("org/pipe", whole)
    found = {path.name for path in (located("org/pipe") / "unet").iterdir()}
    assert set(SHARDS) <= found
    assert not found & {"model.fp16.safetensors", "pytorch_model.bin"}


def test_without_huggingface_hub(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", None)
    with pytest.raises(EndorError, match=r"need huggingface_hub; install it: pip install"):
        located("org/name")
