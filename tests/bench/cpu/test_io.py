from dataclasses import replace

import numpy as np
import pytest

from endor.bench.cpu import io as io_module
from endor.bench.cpu.io import IoCase, drop_cache, io, resident_share
from endor.errors import BackendError, ConfigError

SUBJECTS = (
    "raw O_DIRECT",
    "plain preadv, 1 thread",
    "endor direct",
    "endor buffered",
    "safetensors safe_open",
)


@pytest.fixture
def toy_io(tmp_path) -> IoCase:
    return IoCase(tmp_path, file_bytes=1 << 18, record_bytes=1 << 16, threads=2, repeats=1)


def test_every_reader_is_measured_cold_and_warm(toy_io, tmp_path):
    run = io(toy_io)

    expected = [f"{name}, {state}" for state in ("cold", "warm") for name in SUBJECTS]
    missing = [name.partition(",")[0] for name in run.missing]
    assert [record.subject for record in run.records] == [
        name for name in expected if name.rpartition(",")[0] not in missing
    ]
    size = run.records[0].shape[0]
    assert 1 << 18 <= size <= (1 << 18) + (1 << 15)
    assert {record.traffic_bytes for record in run.records} == {size}
    assert {record.subject for record in run.records if record.peer} == {
        "safetensors safe_open, cold",
        "safetensors safe_open, warm",
    }
    assert list(tmp_path.iterdir()) == []


def test_without_peers(toy_io):
    run = io(replace(toy_io, peers=False))
    assert not any(record.peer for record in run.records)


def test_a_file_system_without_direct_reads_is_reported(toy_io, monkeypatch):
    true_open = io_module.open_reader

    def refuse(kind, **options):
        if kind == "direct":
            raise BackendError("direct: no O_DIRECT here")
        return true_open(kind, **options)

    monkeypatch.setattr(io_module, "open_reader", refuse)
    run = io(toy_io)
    assert run.missing["endor direct"] == "direct: no O_DIRECT here"
    assert "endor buffered, cold" in [record.subject for record in run.records]


def test_a_reader_that_delivers_wrong_bytes_is_an_error(toy_io, monkeypatch):
    true_run = io_module._through

    def broken(reader, records, buffer):
        run = true_run(reader, records, buffer)

        def spoiled(turn):
            run(turn)
            buffer.array[5] ^= 1

        return spoiled

    monkeypatch.setattr(io_module, "_through", broken)
    with pytest.raises(BackendError, match="wrong bytes in record"):
        io(toy_io)


def test_the_resident_share_follows_the_page_cache(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(np.zeros(64 * 4096, np.uint8).tobytes())

    assert resident_share(path) == 1.0
    drop_cache(path)
    # A file system in memory keeps its pages.
    assert resident_share(path) in (0.0, 1.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"threads": 0}, "at least 1"),
        ({"repeats": 0}, "at least 1"),
        ({"record_bytes": 100}, "record_bytes must lie between"),
        ({"record_bytes": 1 << 20}, "record_bytes must lie between"),
    ],
)
def test_wrong_settings_are_refused(toy_io, change, message):
    with pytest.raises(ConfigError, match=message):
        io(replace(toy_io, **change))
