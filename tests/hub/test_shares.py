"""Packing by several processes: the same bytes as one, and what breaks."""

import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from endor.errors import CheckpointError, ConfigError, OutputExistsError
from endor.packing import pack_checkpoint
from endor.packing.shares import Share, finish_checkpoint, pack_share
from endor.quantization.contract import QuantizeOptions
from tests.hub.test_located import files, unmarked

SMALL = 1 << 20


def pack(model, out, count, **options):
    for number in range(1, count + 1):
        pack_share(model, out, Share(number, count), max_shard_bytes=SMALL, **options)
    return finish_checkpoint(out)


@pytest.mark.parametrize("count", [1, 2, 3, 7])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"prune": "magnitude"},
        {"prune": "magnitude", "pattern": "2:4", "codec": "raw"},
        {"quantize": QuantizeOptions(bits=4), "calibrate": False},
        {"include": ("model.embed_tokens.weight",), "exclude": ("*.o_proj.weight",)},
    ],
)
def test_the_same_bytes(model, tmp_path, count, options):
    report = pack(model, tmp_path / "there", count, **options)
    pack_checkpoint(model, tmp_path / "here", max_shard_bytes=SMALL, **options)
    assert files(tmp_path / "there") == files(tmp_path / "here")
    assert report.path == tmp_path / "there"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["here", "local", "there"]


def test_as_many_shares_as_records(model, tmp_path):
    with pytest.raises(ConfigError, match="more shares than the 22 records"):
        pack_share(model, tmp_path / "out", Share(1, 23))
    pack(model, tmp_path / "out", 22)
    pack_checkpoint(model, tmp_path / "here", max_shard_bytes=SMALL)
    assert files(tmp_path / "out") == files(tmp_path / "here")


def test_at_once(model, tmp_path):
    """Workers on shared storage do not disturb each other."""
    with ThreadPoolExecutor(3) as pool:
        shares = [Share(number, 3) for number in (1, 2, 3)]
        list(pool.map(lambda one: pack_share(model, tmp_path / "out", one, threads=1), shares))
    finish_checkpoint(tmp_path / "out")
    pack_checkpoint(model, tmp_path / "here")
    assert files(tmp_path / "out") == files(tmp_path / "here")


def test_again(model, tmp_path):
    """A share that is there is kept: a lost worker's task may simply be run again."""
    first = pack_share(model, tmp_path / "out", Share(1, 2))
    before = files(tmp_path / "out.shares")
    again = pack_share(model, tmp_path / "out", Share(1, 2))
    assert again.converted_bytes == 0
    assert again.sizes == first.sizes
    assert files(tmp_path / "out.shares") == before


def test_a_missing_share(model, tmp_path):
    with pytest.raises(CheckpointError, match="no shares here; pack them first"):
        finish_checkpoint(tmp_path / "out")
    pack_share(model, tmp_path / "out", Share(1, 3))
    with pytest.raises(CheckpointError, match=r"2 of 3 shares are missing: .*--shard 2/3"):
        finish_checkpoint(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_another_number_of_shares(model, tmp_path):
    pack_share(model, tmp_path / "out", Share(1, 3))
    with pytest.raises(CheckpointError, match="holds share 00001-of-00003, and 1/2 is of another"):
        pack_share(model, tmp_path / "out", Share(1, 2))


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"prune": "magnitude"}, "prune"),
        ({"codec": "raw"}, "codec"),
        ({"exclude": ("*.o_proj.weight",)}, "selected"),
        ({"max_shard_bytes": 2 << 20}, "max_shard_bytes"),
    ],
)
def test_a_share_of_other_options(model, tmp_path, options, key):
    pack_share(model, tmp_path / "out", Share(1, 2))
    pack_share(model, tmp_path / "out", Share(2, 2), **options)
    with pytest.raises(CheckpointError, match=f"is the share of another run: {key} was"):
        finish_checkpoint(tmp_path / "out")
    with pytest.raises(CheckpointError, match="is the share of another run"):
        pack_share(model, tmp_path / "out", Share(2, 2))
    assert not (tmp_path / "out").exists()


def test_a_model_that_changed(model, tmp_path):
    pack_share(model, tmp_path / "out", Share(1, 2))
    shard = next(model.glob("*.safetensors"))
    os.utime(shard, (1, 1))
    pack_share(model, tmp_path / "out", Share(2, 2))
    with pytest.raises(CheckpointError, match="is the share of another run: source was"):
        finish_checkpoint(tmp_path / "out")


def test_damage(model, tmp_path):
    for number in (1, 2):
        pack_share(model, tmp_path / "out", Share(number, 2))
    shard = next((tmp_path / "out.shares/00002-of-00002").glob("endor-*.safetensors"))
    content = bytearray(shard.read_bytes())
    content[-5000] ^= 1
    shard.write_bytes(content)
    with pytest.raises(Exception, match="checksum"):
        finish_checkpoint(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    shutil.rmtree(tmp_path / "out.shares/00002-of-00002")
    pack_share(model, tmp_path / "out", Share(2, 2))
    finish_checkpoint(tmp_path / "out")


def test_out_is_there(model, tmp_path):
    pack_checkpoint(model, tmp_path / "out")
    with pytest.raises(OutputExistsError):
        pack_share(model, tmp_path / "out", Share(1, 1))
    pack_share(model, tmp_path / "out", Share(1, 1), overwrite=True, prune="magnitude")
    finish_checkpoint(tmp_path / "out", overwrite=True)
    pack_checkpoint(model, tmp_path / "here", prune="magnitude")
    assert files(tmp_path / "out") == files(tmp_path / "here")


@pytest.mark.parametrize("text", ["", "1", "0/2", "3/2", "1/0", "a/b", "-1/2", "1/2/3", "1/99999"])
def test_no_share(text):
    with pytest.raises(ConfigError, match="must be I/N"):
        Share.parse(text)


@pytest.mark.parametrize(
    "options",
    [
        {"prune": "wanda"},
        {"quality": 0.1},
        {"quantize": QuantizeOptions(bits=4)},
    ],
)
def test_what_is_calibrated_is_refused(model, tmp_path, options):
    with pytest.raises(ConfigError, match="in one process"):
        pack_share(model, tmp_path / "out", Share(1, 2), **options)
    assert not (tmp_path / "out.shares").exists()


def test_streamed(server, model, tmp_path):
    """Each worker fetches what it packs, and who assembles fetches headers."""
    server.add("org/name", model)
    with pytest.raises(ConfigError, match="workers share no cache of the Hub; add --stream"):
        pack_share("org/name", tmp_path / "out", Share(1, 2))
    for number in (1, 2):
        pack_share("org/name", tmp_path / "out", Share(number, 2), stream=True)
    before = sum(server.sent.values())
    finish_checkpoint(tmp_path / "out")
    assert sum(server.sent.values()) - before < 1 << 19
    pack_checkpoint(model, tmp_path / "here")
    assert unmarked(tmp_path / "out") == unmarked(tmp_path / "here")


def test_commands(model, tmp_path):
    def run(*words):
        return subprocess.run(
            [sys.executable, "-m", "endor", *map(str, words)],
            capture_output=True,
            text=True,
            check=False,
        )

    out = tmp_path / "out"
    for number in (1, 2):
        done = run("pack", model, out, "--prune", "magnitude", "--shard", f"{number}/2", "--json")
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["path"].endswith(f"0000{number}-of-00002")
    done = run("pack", out, "--finish")
    assert done.returncode == 0, done.stderr
    pack_checkpoint(model, tmp_path / "here", prune="magnitude")
    assert files(out) == files(tmp_path / "here")
    for words, message in (
        (["pack", model], "Missing argument 'OUT'"),
        (["pack", model, out, "--finish"], "--finish takes OUT alone"),
        (["pack", out, "--finish", "--shard", "1/2"], "--finish"),
        (["pack", out, "--finish", "--prune", "magnitude"], "--finish takes no --prune"),
    ):
        done = run(*words)
        assert done.returncode == 2, done.stderr
        assert message in done.stderr
