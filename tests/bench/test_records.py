import json
import subprocess
from dataclasses import replace

import pytest

import endor
from endor.bench import records
from endor.bench.records import (
    BenchRecord,
    environment,
    last_level_cache_bytes,
    read_json_lines,
    write_json_lines,
)
from endor.errors import FormatError


@pytest.fixture
def record() -> BenchRecord:
    return BenchRecord(
        bench="decode",
        subject="endor raw",
        shape=(2, 3),
        dtype="BF16",
        density=0.5,
        threads=1,
        p20=0.9,
        p50=2.0,
        p80=2.5,
        repeats=9,
        traffic_bytes=8 * 10**9,
        environment=environment(),
        dense_bytes=4 * 10**9,
        ceiling="non-temporal copy",
        ceiling_gbps=5.0,
    )


def test_rates_follow_from_the_median(record):
    assert (record.gbps, record.dense_gbps, record.ceiling_ratio) == (4.0, 2.0, 0.8)
    assert replace(record, ceiling_gbps=0.0).ceiling_ratio == 0.0


def test_json_lines_append_and_come_back(record, tmp_path):
    path = tmp_path / "bench.jsonl"
    other = replace(record, subject="torch", peer=True)
    write_json_lines([record], path)
    write_json_lines([other], path)

    assert list(read_json_lines(path)) == [record, other]
    line = json.loads(path.read_text().splitlines()[0])
    assert line["gbps"] == 4.0
    assert line["environment"]["versions"]["endor"] == endor.__version__


@pytest.mark.parametrize("line", ["{", "[]", '{"bench": "decode"}', "3"])
def test_a_foreign_line_is_refused_with_its_number(record, tmp_path, line):
    path = tmp_path / "bench.jsonl"
    write_json_lines([record], path)
    with path.open("a") as file:
        file.write(line + "\n")

    with pytest.raises(FormatError, match=r"bench\.jsonl:2: not a benchmark record"):
        list(read_json_lines(path))


def test_the_environment_names_machine_versions_and_kernel():
    found = environment()

    assert found.device
    assert found.cores >= 1
    assert found.driver.startswith("Linux")
    assert {"endor", "python", "numpy", "torch"} <= set(found.versions)
    assert set(found.kernel) == {"kernel", "reason", "bf16_products"}
    assert environment("H200").device == "H200"


def test_no_git_is_no_error(monkeypatch):
    def missing(*_, **__):
        raise FileNotFoundError("git")

    monkeypatch.setattr(subprocess, "run", missing)
    assert records._git_rev() == ""


def test_the_cache_size_is_plausible():
    assert 1 << 18 <= last_level_cache_bytes() <= 1 << 31


@pytest.mark.parametrize(
    ("bench", "ceiling_gbps", "believed"),
    [
        ("decode", 4.0, True),
        ("decode", 3.7, True),
        ("decode", 3.6, False),
        ("pack", 1.0, False),
        ("decode", 0.0, True),
        ("io", 1.0, True),  # the page cache may be faster than the disk
    ],
)
def test_a_rate_above_its_ceiling_is_not_printed_as_a_result(record, bench, ceiling_gbps, believed):
    from types import SimpleNamespace

    from endor.cli.bench import report

    one = replace(record, bench=bench, ceiling_gbps=ceiling_gbps)
    assert one.to_dict()["believable"] is believed
    said = report(SimpleNamespace(records=[one], missing={}))
    assert ("4.00" in said) is believed
    assert ("too busy" in said) is not believed
