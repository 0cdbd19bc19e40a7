"""What is remembered of this machine, and the arithmetic that follows from it."""

import json

import pytest
import torch

from endor import machine
from endor.machine import Arithmetic

CPU = torch.device("cpu")


@pytest.fixture
def probes(monkeypatch, tmp_path):
    """Point the cache to `tmp_path` and count the measurements."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    probe, calls = machine.measure_arithmetic, []

    def counted():
        calls.append(1)
        return probe(rows=4, size=32)

    monkeypatch.setattr(machine, "measure_arithmetic", counted)
    return calls


def test_the_faster_type_is_chosen(monkeypatch):
    monkeypatch.setattr(machine, "arithmetic", lambda: Arithmetic(13.0, 82.0))
    assert machine.compute_dtype(CPU) == torch.float32
    monkeypatch.setattr(machine, "arithmetic", lambda: Arithmetic(400.0, 160.0))
    assert machine.compute_dtype(CPU) == torch.bfloat16


@pytest.mark.parametrize(("capability", "dtype"), [((7, 5), "float32"), ((8, 6), "bfloat16")])
def test_a_device_that_emulates_bfloat16_computes_in_float32(monkeypatch, capability, dtype):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert machine.compute_dtype(torch.device("cuda")) == getattr(torch, dtype)


def test_it_is_measured_once_and_remembered(probes):
    first = machine.arithmetic()
    assert first.gflops == max(first.bf16_gflops, first.float32_gflops) > 0
    assert machine.arithmetic() == first
    assert len(probes) == 1
    machine.arithmetic(refresh=True)
    assert len(probes) == 2


def test_another_machine_measures_again(probes, monkeypatch):
    machine.arithmetic()
    facts = machine.fingerprint_facts()
    monkeypatch.setattr(machine, "fingerprint_facts", lambda: {**facts, "threads": 99})
    machine.arithmetic()
    assert len(probes) == 2


@pytest.mark.parametrize("damage", ["", "[]", "[" * 100000, '{"version": 99}', "\udc80"])
def test_a_damaged_cache_measures_again(probes, damage):
    machine.arithmetic()
    machine.cache_path().write_bytes(damage.encode("utf-8", "surrogateescape"))
    machine.arithmetic()
    assert len(probes) == 2
    assert json.loads(machine.cache_path().read_text())["version"] == machine.CACHE_VERSION


@pytest.mark.parametrize("rate", [0, -1.0, True, None, "82", [], float("nan"), float("inf")])
def test_an_entry_that_no_measurement_gives_measures_again(probes, rate):
    machine.arithmetic()
    content = json.loads(machine.cache_path().read_text())
    for entry in content["arithmetic"].values():
        entry["float32_gflops"] = rate
    machine.cache_path().write_text(json.dumps(content))
    assert machine.arithmetic().float32_gflops > 0
    assert len(probes) == 2


def test_a_cache_that_cannot_be_written_is_no_reason_to_fail(probes, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert machine.arithmetic().gflops > 0
