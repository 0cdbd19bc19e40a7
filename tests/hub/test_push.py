"""Packed checkpoints to the Hub: what goes up, the card, and whose README stays."""

import json
import os

import pytest
import yaml
from click.testing import CliRunner

import endor
from endor.cli.main import cli
from endor.errors import CheckpointError, ConfigError, HubError
from endor.packing import pack_checkpoint
from endor.quantization.contract import QuantizeOptions
from endor.sharing.card import MARK, CardFacts, model_card, read_evaluation
from endor.sharing.push import push_checkpoint
from tests.hub.conftest import write_model
from tests.hub.test_located import files
from tests.support.hub import status

# huggingface_hub uploads large files in a way that its own HTTP library warns about.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


@pytest.fixture
def packed(model, tmp_path):
    pack_checkpoint(model, tmp_path / "packed", prune="magnitude", max_shard_bytes=1 << 20)
    return tmp_path / "packed"


def metadata(card):
    return yaml.safe_load(card.split("---\n")[1])


def on_the_hub(server, repo="org/packed", branch="main"):
    model = server.models[repo]
    return model.commits[model.branches[branch]]


def test_pushed_and_fetched(server, packed, capsys):
    before = files(packed)
    done = push_checkpoint(packed, "org/packed", private=True)
    assert capsys.readouterr() == ("", ""), "the library prints nothing"
    assert done.url.startswith(server.url)
    assert server.models["org/packed"].private
    there = on_the_hub(server)
    assert {name: there[name] for name in there if name != "README.md"} == {
        name: before[name] for name in before if name != "README.md"
    }
    assert there["README.md"].decode() == done.card
    assert files(packed) == before, "nothing here is changed"
    assert endor.verify_checkpoint("org/packed", against=packed).ok


def test_the_card(model, packed, tmp_path):
    card = model_card(packed, CardFacts("org/packed", "base/model", {"perplexity": 12.5}))
    about = metadata(card)
    assert about["license"] == "apache-2.0"
    assert about["base_model"] == "base/model"
    assert about["base_model_relation"] == "quantized"
    assert about["library_name"] == "endor"
    assert {"endor", "pruned"} <= set(about["tags"])
    assert "pruned by magnitude to 50% zeros" in card
    assert "perplexity | 12.500" in card
    sizes = endor.inspect_checkpoint(packed).sizes
    assert f"{sizes.bits_per_weight:.3f}" in card
    assert f"{sizes.ratio:.2f} times" in card
    assert 'endor.load_model("org/packed"' in card

    pack_checkpoint(model, tmp_path / "q", quantize=QuantizeOptions(bits=3.5), calibrate=False)
    card = model_card(tmp_path / "q")
    assert "quantised to 3.5 bits a weight by round, without calibration" in card
    assert "quantized" in metadata(card)["tags"]
    pack_checkpoint(model, tmp_path / "exact")
    card = model_card(tmp_path / "exact")
    assert "every bit kept" in card
    assert "base_model_relation" not in metadata(card)


@pytest.mark.parametrize("text", ["no metadata", "---\n: [\n---\n", "---\n- a list\n---\n", ""])
def test_any_readme_of_the_base(tmp_path, text):
    model = write_model(tmp_path / "m")
    (model / "README.md").write_text(text)
    pack_checkpoint(model, tmp_path / "packed")
    assert "license" not in metadata(model_card(tmp_path / "packed"))


def test_a_readme_that_somebody_wrote_here(server, packed):
    """It goes up as it is, also when nobody listed it."""
    mine = "my own words"
    (packed / "README.md").write_text(mine)
    later = (packed / "endor.safetensors.index.json").stat().st_mtime + 60
    os.utime(packed / "README.md", (later, later))
    assert push_checkpoint(packed, "org/packed").card is None
    assert on_the_hub(server)["README.md"] == mine.encode()
    push_checkpoint(packed, "org/packed", card="new")
    assert MARK.encode() in on_the_hub(server)["README.md"]
    assert (packed / "README.md").read_text() == mine


def test_a_readme_that_somebody_wrote_there(server, packed):
    push_checkpoint(packed, "org/packed")
    push_checkpoint(packed, "org/packed")  # ours is made anew
    there = on_the_hub(server)
    assert MARK.encode() in there["README.md"]
    server.models["org/packed"].commit({**there, "README.md": b"edited on the Hub"})
    assert push_checkpoint(packed, "org/packed").card is None
    assert on_the_hub(server)["README.md"] == b"edited on the Hub"


def test_shards_of_an_earlier_push_go(server, model, tmp_path):
    pack_checkpoint(model, tmp_path / "two", max_shard_bytes=1 << 20)
    push_checkpoint(tmp_path / "two", "org/packed")
    pack_checkpoint(model, tmp_path / "one", prune="magnitude")
    done = push_checkpoint(tmp_path / "one", "org/packed")
    assert done.removed
    assert set(on_the_hub(server)) == {*files(tmp_path / "one")}
    assert endor.verify_checkpoint("org/packed", against=tmp_path / "one").ok


def test_other_files_are_not_joined_unasked(server, model, packed):
    server.add("org/dense", model)
    with pytest.raises(HubError, match=r"holds .* already; add --yes .* or --create-pr"):
        push_checkpoint(packed, "org/dense")
    assert not any(name.startswith("endor-") for name in on_the_hub(server, "org/dense"))
    done = push_checkpoint(packed, "org/dense", create_pr=True)
    assert done.url.endswith("/discussions/1")
    assert not any(name.startswith("endor-") for name in on_the_hub(server, "org/dense"))
    proposed = on_the_hub(server, "org/dense", "refs/pr/1")
    assert any(name.startswith("endor-") for name in proposed)
    push_checkpoint(packed, "org/dense", over_others=True, revision="packed")
    assert any(name.startswith("endor-") for name in on_the_hub(server, "org/dense", "packed"))
    assert "model.safetensors.index.json" in on_the_hub(server, "org/dense")


def test_only_what_was_published(server, packed):
    (packed / "secret.env").write_text("password")
    push_checkpoint(packed, "org/packed")
    assert "secret.env" not in on_the_hub(server)


def test_dry_run(server, packed):
    found = push_checkpoint(packed, "org/packed", dry_run=True)
    assert found.card is not None
    assert "org/packed" not in server.models
    assert not [request for request in server.requests if request[0] != "GET"]


@pytest.mark.parametrize("repo", ["packed", "a/b/c", "org/name@v1", "org/na--me", "org/.git", ""])
def test_no_id(server, packed, repo):
    with pytest.raises(ConfigError, match="must be the id of a model"):
        push_checkpoint(packed, repo)
    assert not server.requests


def test_no_packed_checkpoint(server, model, packed):
    with pytest.raises(CheckpointError, match="no packed checkpoint here"):
        push_checkpoint(model, "org/packed")
    (packed / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"tokenizer.json is missing"):
        push_checkpoint(packed, "org/packed")
    assert not server.models


@pytest.mark.parametrize(("code", "message"), [(401, "HF_TOKEN"), (403, "HF_TOKEN"), (500, "fail")])
def test_no_access(server, packed, code, message):
    server.faults["post"] += [status(code)] * 50
    with pytest.raises(HubError, match=message) as caught:
        push_checkpoint(packed, "org/packed")
    assert "\n" not in str(caught.value)


def test_commands(server, packed, tmp_path):
    scores = tmp_path / "eval.jsonl"
    scores.write_text('{"perplexity": 9.25, "window": 512}\n')
    run = CliRunner().invoke
    shown = run(cli, ["card", str(packed), "--base", "base/model", "--eval", str(scores)])
    assert shown.exit_code == 0, shown.output
    assert "perplexity | 9.250, windows of 512 tokens" in shown.output
    dry = run(cli, ["push", str(packed), "org/packed", "--dry-run"])
    assert "org/packed would get" in dry.output
    assert MARK in dry.output
    done = run(cli, ["push", str(packed), "org/packed", "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.output)["url"].startswith(server.url)
    scores.write_text("nothing")
    with pytest.raises(ConfigError, match="must hold what `endor eval"):
        read_evaluation(scores)
