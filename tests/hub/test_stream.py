"""Models that are fetched while they are packed: the same bytes, little disk, and what breaks."""

import errno
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
from safetensors.torch import save_file

import endor
from endor.errors import CheckpointError, ChecksumError, ConfigError, HubError
from endor.packing import pack_checkpoint
from endor.quantization.contract import QuantizeOptions
from endor.sharing import streamed
from tests.hub.conftest import write_model
from tests.hub.test_located import SHARDS, files, unmarked
from tests.support.hub import damage, drop_after, hold_after, status

SMALL = 1 << 20


def pack(out, **options):
    return pack_checkpoint("org/name", out, stream=True, max_shard_bytes=SMALL, **options)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"prune": "magnitude"},
        {"prune": "magnitude", "pattern": "2:4"},
        {"quantize": QuantizeOptions(bits=4), "calibrate": False},
        {"prune": "magnitude", "quantize": QuantizeOptions(bits=3), "calibrate": False},
    ],
)
def test_the_same_bytes(server, model, tmp_path, options):
    server.add("org/name", model)
    report = pack(tmp_path / "there", **options)
    sent = dict(server.sent)
    pack_checkpoint("org/name", tmp_path / "here", max_shard_bytes=SMALL, **options)
    assert files(tmp_path / "there") == files(tmp_path / "here")
    assert 1 <= report.streamed_shards <= 3
    assert sorted(path.name for path in tmp_path.glob("*.partial")) == []
    for shard in SHARDS:
        assert sent[shard] < 1.5 * (model / shard).stat().st_size + (1 << 17)


def test_little_disk(server, tmp_path, monkeypatch):
    """Of sixteen shards no more than three are there at once, whole or in part."""
    model = write_model(tmp_path / "large", shards=16)
    server.add("org/name", model)
    most = 0
    fetch = streamed.fetch

    def counted(repository, file, target, **options):
        nonlocal most
        fetch(repository, file, target, **options)
        most = max(most, len(list(target.parent.iterdir())))

    monkeypatch.setattr(streamed, "fetch", counted)
    report = pack(tmp_path / "out")
    assert 1 <= most <= 3
    assert 1 <= report.streamed_shards <= 3
    assert endor.verify_checkpoint(tmp_path / "out", against=model).ok


def test_shards_in_another_order(server, tmp_path):
    """A checkpoint whose shards cut across layers needs more of them at once, and ends."""
    model = write_model(tmp_path / "odd", shards=4)
    state = {}
    for shard in SHARDS:
        from safetensors.torch import load_file

        state |= load_file(model / shard)
    names = list(state)
    weight_map = {}
    for number, shard in enumerate(SHARDS):
        part = names[number :: len(SHARDS)]
        save_file({name: state[name] for name in part}, model / shard, {"format": "pt"})
        weight_map |= dict.fromkeys(part, shard)
    index = '{"metadata": {}, "weight_map": ' + str(weight_map).replace("'", '"') + "}"
    (model / "model.safetensors.index.json").write_text(index)
    server.add("org/name", model)
    report = pack(tmp_path / "out")
    assert report.streamed_shards == 4
    assert endor.verify_checkpoint(tmp_path / "out", against=model).ok


def test_a_connection_that_drops(server, model, tmp_path):
    """What came is kept; the rest is asked for, and all of it is checked."""
    server.add("org/name", model)
    server.faults[SHARDS[1]] += [lambda *_: False, drop_after(100_000), status(503), drop_after(7)]
    pack(tmp_path / "there")
    pack_checkpoint(model, tmp_path / "here", max_shard_bytes=SMALL)
    assert unmarked(tmp_path / "there") == unmarked(tmp_path / "here")
    ranges = [part for _, name, part in server.asked(SHARDS[1]) if part]
    assert any(part.startswith("bytes=100000-") for part in ranges)
    assert any(part.startswith("bytes=100007-") for part in ranges)


def test_a_hub_that_stays_away(server, model, tmp_path):
    server.add("org/name", model)
    server.faults[SHARDS[1]] += [lambda *_: False, *[drop_after(0)] * 20]
    with pytest.raises(HubError, match=r"the connection ended after 0 of|cannot be reached"):
        pack(tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("code", "message"), [(404, "refuses"), (403, "HF_TOKEN"), (401, "HF_")])
def test_a_shard_that_is_refused(server, model, tmp_path, code, message):
    server.add("org/name", model)
    server.faults[SHARDS[2]] += [lambda *_: False, *[status(code)] * 20]
    with pytest.raises(HubError, match=message) as caught:
        pack(tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_busy_hub(server, model, tmp_path):
    server.add("org/name", model)
    server.faults[SHARDS[0]] += [lambda *_: False, status(429, {"Retry-After": "0"})]
    pack(tmp_path / "out")
    assert endor.verify_checkpoint(tmp_path / "out", against=model).ok


def test_damage_on_the_way(server, model, tmp_path):
    server.add("org/name", model)
    server.faults[SHARDS[1]] += [lambda *_: False, damage]
    pack(tmp_path / "out")
    assert endor.verify_checkpoint(tmp_path / "out", against=model).ok


def test_damage_on_the_hub(server, model, tmp_path):
    server.add("org/name", model)
    server.faults[SHARDS[1]] += [lambda *_: False, *[damage] * 9]
    with pytest.raises(ChecksumError, match=rf"{SHARDS[1]}: its sha256 must be .* is damaged"):
        pack(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_shard_that_is_shorter_than_its_header_says(server, model, tmp_path):
    whole = (model / SHARDS[1]).read_bytes()
    (model / SHARDS[1]).write_bytes(whole[:-100])
    server.add("org/name", model)
    with pytest.raises((CheckpointError, HubError), match=SHARDS[1]):
        pack(tmp_path / "out")
    assert list(tmp_path.glob("out*")) == []


def test_no_parts_of_files(server, model, tmp_path, monkeypatch):
    server.add("org/name", model)
    monkeypatch.setattr("tests.support.hub.RANGES", False)
    with pytest.raises(HubError, match="sends no parts of files; leave out --stream"):
        pack(tmp_path / "out")


def test_a_full_disk(server, model, tmp_path, monkeypatch):
    server.add("org/name", model)

    def full(fd, data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("endor.hub.transfer.os.write", full)
    with pytest.raises(OSError, match="No space left on device"):
        pack(tmp_path / "out")
    assert list(tmp_path.glob("out*")) == []


def test_resumed(server, model, tmp_path, monkeypatch):
    """What was packed is not fetched again, and a moved branch is another model."""
    server.add("org/name", model)
    server.faults[SHARDS[3]] += [lambda *_: False, *[status(403)] * 9]
    with pytest.raises(HubError, match="HF_TOKEN"):
        pack_checkpoint("org/name", tmp_path / "out", stream=True, max_shard_bytes=SMALL)
    assert (tmp_path / "out.partial").is_dir(), "one output shard was finished"
    server.faults.clear()
    commit = server.models["org/name"].branches["main"]
    moved = dict(server.models["org/name"].commits[commit]) | {"LICENSE": b"another"}
    server.models["org/name"].commit(moved)
    before = dict(server.sent)
    with pytest.raises(CheckpointError, match=f"source was .*org/name@{commit}"):
        pack(tmp_path / "out", resume=True)
    report = pack(tmp_path / "out", resume=True, revision=commit)
    assert report.resumed_shards >= 1
    again = server.sent[SHARDS[0]] - before[SHARDS[0]]
    assert again <= 1 << 17, "only the header"
    pack_checkpoint(model, tmp_path / "here", max_shard_bytes=SMALL)
    assert unmarked(tmp_path / "out") == unmarked(tmp_path / "here")


SCRIPT = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where `make test &` was said
from endor.packing import pack_checkpoint
pack_checkpoint(
    "org/name", sys.argv[1], stream=True, max_shard_bytes=1 << 20, resume=True, threads=1
)
"""


def started(server, tmp_path):
    hub = {"HF_ENDPOINT": server.url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "home")}
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(tmp_path / "out")],
        env={**os.environ, **hub, "HF_HUB_DISABLE_XET": "1"},
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_killed(server, model, tmp_path, how):
    """Killed in the middle of a download; the next run goes on there."""
    server.add("org/name", model)
    release = threading.Event()
    server.faults[SHARDS[3]] += [lambda *_: False, hold_after(100_000, release)]
    process = started(server, tmp_path)
    waited = time.monotonic() + 120
    while time.monotonic() < waited:
        part = (tmp_path / "out.partial/source/shard-00004.part").exists()
        journal = tmp_path / "out.partial/journal.jsonl"
        if part and journal.exists() and '"file"' in journal.read_text():
            break
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    process.send_signal(how)
    release.set()
    assert process.wait(60) != 0
    process.stderr.close()
    assert not (tmp_path / "out").exists()
    before = dict(server.sent)
    second = started(server, tmp_path)
    assert second.wait(120) == 0, second.stderr.read()
    second.stderr.close()
    assert server.sent[SHARDS[0]] - before[SHARDS[0]] <= 1 << 17, "only the header"
    assert endor.verify_checkpoint(tmp_path / "out", against=model).ok
    assert list(tmp_path.glob("*.partial")) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prune": "wanda"}, "--stream reads each weight once"),
        ({"quantize": QuantizeOptions(bits=4)}, "for calibration, and where"),
        ({"quality": 0.1}, "for calibration, and where"),
    ],
)
def test_what_is_calibrated_is_refused(server, tmp_path, options, message):
    with pytest.raises(ConfigError, match=message):
        pack(tmp_path / "out", **options)
    assert not server.requests


def test_what_cannot_be_streamed(server, model, tmp_path):
    with pytest.raises(ConfigError, match="is no model on the Hub, which --stream is for"):
        pack_checkpoint(model, tmp_path / "out", stream=True)
    pack_checkpoint(model, tmp_path / "packed")
    server.add("org/name", tmp_path / "packed")
    with pytest.raises(HubError, match="is packed already"):
        pack(tmp_path / "out")
    torch.save({"a.weight": torch.ones(4, 4)}, model / "pytorch_model.bin")
    for shard in [*SHARDS, "model.safetensors.index.json"]:
        (model / shard).unlink()
    server.models.clear()
    server.add("org/name", model)
    with pytest.raises(HubError, match=r"takes safetensors, and this is pytorch_model.bin"):
        pack(tmp_path / "out")


def test_a_stranger_in_the_folder(server, model, tmp_path):
    """What Endor did not write is not removed."""
    server.add("org/name", model)
    server.faults[SHARDS[3]] += [lambda *_: False, *[status(403)] * 9]
    with pytest.raises(HubError):
        pack(tmp_path / "out")
    server.faults.clear()
    mine = tmp_path / "out.partial/source/mine.txt"
    mine.parent.mkdir(exist_ok=True)
    mine.write_text("mine")
    with pytest.raises(CheckpointError, match=r"holds source/mine.txt, which Endor did not write"):
        pack(tmp_path / "out", overwrite=True)
    assert mine.read_text() == "mine"
