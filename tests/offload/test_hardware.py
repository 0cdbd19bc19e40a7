"""Machine constants are measured once, remembered, and measured again when the machine changes."""

import json

import pytest
import torch

from endor.errors import ConfigError
from endor.offload import hardware, probes


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
    rates = [found.copy_gbps, found.read_gbps, found.linear_gbps, found.gemm_gflops, found.op_us]
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
    "damage", ["", "[]", "not json", '{"version": 99}', '{"version": 2, "machines": 3}']
)
def test_a_damaged_cache_is_replaced(quick, damage):
    hardware.machine("BF16")
    hardware.cache_path().write_text(damage)
    hardware.machine("BF16")
    assert len(quick) == 2
    assert json.loads(hardware.cache_path().read_text())["version"] == hardware.CACHE_VERSION


def test_an_entry_of_another_version_is_replaced(quick):
    hardware.machine("BF16")
    content = json.loads(hardware.cache_path().read_text())
    for entry in content["machines"].values():
        del entry["constants"]["linear_gbps"]
    hardware.cache_path().write_text(json.dumps(content))
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
    assert hardware.disk(model) == found
    assert seen == ["weights"]
    hardware.disk(model, refresh=True)
    assert len(seen) == 2


def test_a_directory_without_files_is_refused(quick, tmp_path):
    with pytest.raises(ConfigError, match="needs a file"):
        hardware.disk(tmp_path)


def test_read_only_cache_is_no_reason_to_fail(quick, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert hardware.machine("BF16").threads == torch.get_num_threads()
