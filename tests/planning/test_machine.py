"""Machine constants are measured once, remembered, and measured again when the machine changes."""

import json
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime

import numpy as np
import pytest
import torch

from endor import machine
from endor.errors import ConfigError
from endor.planning import machine as hardware
from endor.planning import probes, request_probe


@pytest.fixture
def quick(monkeypatch, tmp_path):
    """Point the cache to `tmp_path`, shrink the probes, and count the measurements."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    calls = []

    def small(dtype="BF16"):
        calls.append(dtype)
        return hardware.Machine(
            dtype=dtype,
            threads=torch.get_num_threads(),
            **probes.memory(1, 1 << 20),
            **probes.codecs(dtype, 1, rows=16, cols=1024),
            **probes.linear(dtype, rows=16, cols=64, batch=4),
        )

    monkeypatch.setattr(hardware, "measure", small)
    return calls


def test_constants_are_positive_and_cover_every_kind(quick):
    found = hardware.machine("BF16")
    kinds = {"raw+bitmap", "exp+bitmap", "exp", "int"}
    assert set(found.expand_gbps) == kinds == set(found.product_gbps)
    rates = [found.plain_gbps, found.plain_row_cost]
    rates += [found.copy_gbps, found.read_gbps, found.linear_gbps, found.gemm_gflops, found.op_us]
    assert min(*rates, *found.expand_gbps.values(), *found.product_gbps.values()) > 0


def test_a_second_call_measures_nothing(quick):
    first = hardware.machine("BF16")
    assert hardware.machine("BF16") == first
    assert quick == ["BF16"]
    hardware.machine("BF16", refresh=True)
    hardware.machine("F32")
    assert quick == ["BF16", "BF16", "F32"]


def test_another_machine_measures_again(quick, monkeypatch):
    hardware.machine("BF16")
    facts = hardware.fingerprint_facts()
    monkeypatch.setattr(hardware, "fingerprint_facts", lambda: {**facts, "cpu": "another"})
    hardware.machine("BF16")
    assert len(quick) == 2


@pytest.mark.parametrize(
    "damage",
    [
        "",
        "[]",
        "not json",
        '{"version": 99}',
        '{"version": 4, "machines": 3}',
        "[" * 100_000,
        '{"version": ' + "9" * 5000 + "}",
    ],
    ids=lambda text: text[:12],
)
def test_a_damaged_cache_is_replaced(quick, damage):
    hardware.machine("BF16")
    machine.cache_path().write_text(damage)
    hardware.machine("BF16")
    assert len(quick) == 2
    assert json.loads(machine.cache_path().read_text())["version"] == machine.CACHE_VERSION


def test_an_entry_of_another_version_is_replaced(quick):
    hardware.machine("BF16")
    content = json.loads(machine.cache_path().read_text())
    for entry in content["machines"].values():
        del entry["constants"]["linear_gbps"]
    machine.cache_path().write_text(json.dumps(content))
    hardware.machine("BF16")
    assert len(quick) == 2


def test_unknown_dtype_is_refused(quick):
    with pytest.raises(ConfigError, match="dtype must be one of BF16"):
        hardware.machine("I8")


def test_disk_is_measured_by_the_largest_file_and_remembered(quick, tmp_path, monkeypatch):
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    with (model / "weights").open("wb") as file:
        file.truncate(65 << 20)
    seen = []
    probe = probes.disk
    monkeypatch.setattr(probes, "disk", lambda path: seen.append(path.name) or probe(path))
    found = hardware.disk(model)
    assert found.slowest_gbps <= found.read_gbps <= found.fastest_gbps
    assert found.request_us > 0
    assert hardware.disk(model) == found
    assert seen == ["weights"]
    hardware.disk(model, refresh=True)
    assert len(seen) == 2


def test_requests_are_counted_and_their_bytes_are_not_theirs(tmp_path, monkeypatch):
    """On a clock that only reads move, each by 50 us, a request costs what a read does."""
    monkeypatch.setattr(request_probe, "read_at_once", lambda *given: None)
    path = tmp_path / "file"
    with path.open("wb") as file:
        file.truncate(65 << 20)
    clock, turn, read = [0.0], threading.Lock(), os.preadv

    def slow(fd, buffers, at):
        with turn:
            clock[0] += {4096: 50e-6, 16384: 80e-6}.get(len(buffers[0]), 1e-3)
        return read(fd, buffers, at)

    monkeypatch.setattr(os, "preadv", slow)
    monkeypatch.setattr(probes.time, "perf_counter", lambda: clock[0])
    found = probes.disk(path)
    assert found["scattered_gbps"] == pytest.approx(12288 / 30e3, rel=1e-3)
    assert found["request_us"] == pytest.approx(40, rel=1e-3)


def test_requests_that_are_made_at_once_are_timed_so(tmp_path, monkeypatch):
    path = tmp_path / "file"
    with path.open("wb") as file:
        file.truncate(65 << 20)
    clock = [0.0]

    def batch(fd, offsets, lengths, addresses):
        assert not (offsets % 4096).any()
        assert offsets.max() < 65 << 20
        clock[0] += len(offsets) * 10e-6
        return lengths.astype(np.int64)

    monkeypatch.setattr(request_probe, "read_at_once", batch)
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    buffer = ThreadPoolExecutor(1)
    with path.open("rb") as file, buffer as pool:
        found = request_probe.request_seconds(pool, 1, file.fileno(), 65 << 20, 4096)
    assert found == pytest.approx(10e-6)


def test_a_disk_remembered_without_the_price_of_a_request_is_measured_again(quick, tmp_path):
    path = tmp_path / "file"
    with path.open("wb") as file:
        file.truncate(65 << 20)
    hardware.disk(path)
    key = hardware._disk_key(path)
    known = hardware.load()["disks"][key]
    assert hardware.known_disk(path).request_us == known.pop("request_us")
    hardware.store("disks", key, known)
    assert hardware.known_disk(path) == hardware.TYPICAL_DISK
    assert hardware.disk(path).request_us > 0
    assert "request_us" in hardware.load()["disks"][key]


def test_a_directory_without_files_is_refused(quick, tmp_path):
    with pytest.raises(ConfigError, match="needs a file"):
        hardware.disk(tmp_path)


def test_read_only_cache_is_no_reason_to_fail(quick, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert hardware.machine("BF16").threads == torch.get_num_threads()


@pytest.mark.parametrize("ratio", [0.7, 1.3])
def test_constants_that_steps_show_wrong_are_measured_again(quick, ratio):
    hardware.machine("BF16")
    said = hardware.doubt("BF16", 1.0, ratio)
    assert f"took {ratio:.2f}x what was predicted" in said
    assert "measured again" in said
    assert hardware.doubt("BF16", 1.0, ratio) == ""  # nothing is remembered that could be wrong
    hardware.machine("BF16")
    assert len(quick) == 2


def test_constants_that_were_right_or_are_recent_stay(quick, monkeypatch):
    hardware.machine("BF16")
    assert hardware.doubt("BF16", 1.0, 1.2) == ""
    content = json.loads(machine.cache_path().read_text())
    for entry in content["machines"].values():
        entry["constants"]["measured"] = datetime.now(UTC).isoformat()
    machine.cache_path().write_text(json.dumps(content))
    assert "is the machine busy" in hardware.doubt("BF16", 1.0, 2.0)
    hardware.machine("BF16")
    assert len(quick) == 1


@pytest.mark.parametrize("value", [0, -1.0, None, "9", [], float("nan"), True])
@pytest.mark.parametrize("field", ["linear_gbps", "float32_gflops", "expand_gbps"])
def test_constants_that_no_measurement_gives_are_replaced(quick, field, value):
    hardware.machine("BF16")
    content = json.loads(machine.cache_path().read_text())
    for entry in content["machines"].values():
        if field == "expand_gbps":
            entry["constants"][field]["exp"] = value
        else:
            entry["constants"][field] = value
    machine.cache_path().write_text(json.dumps(content))
    assert hardware.machine("BF16").linear_gbps > 0
    assert len(quick) == 2


def test_a_disk_that_no_measurement_gives_is_measured_again(quick, tmp_path):
    with (tmp_path / "weights").open("wb") as file:
        file.truncate(65 << 20)
    hardware.disk(tmp_path / "weights")
    content = json.loads(machine.cache_path().read_text())
    for entry in content["disks"].values():
        entry["read_gbps"] = 0
    machine.cache_path().write_text(json.dumps(content))
    assert hardware.disk(tmp_path / "weights").read_gbps > 0
