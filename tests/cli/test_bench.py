import json

import pytest
from click.testing import CliRunner

from endor.bench.records import read_json_lines
from endor.cli.bench import bench_command

TOY = ["--rows", "8", "--cols", "64", "--repeats", "1", "--threads", "1"]


def run(*arguments: str) -> str:
    result = CliRunner().invoke(bench_command, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.mark.parametrize("bench", ["decode", "pack"])
def test_a_table_names_the_case_and_the_ceiling(bench):
    lines = run(bench, *TOY).splitlines()

    assert lines[0].startswith(f"{bench}: 8 x 64 BF16, density 0.5, 1 thread on ")
    assert "of copy" in lines[3]
    assert [line.split("  ")[0] for line in lines[5:8]] == [
        "non-temporal copy",
        "endor raw",
        "endor exp",
    ]


def test_matvec_takes_a_batch():
    assert "endor raw" in run("matvec", *TOY, "--batch", "2")


def test_io_runs_in_the_given_directory(tmp_path):
    out = run("io", "--dir", str(tmp_path), "--size-mib", "1", "--record-mib", "1", "--quick")

    assert "GB file" in out.splitlines()[0]
    assert "endor buffered, cold" in out
    assert list(tmp_path.iterdir()) == []


def test_json_to_a_file_keeps_the_table_and_appends(tmp_path):
    path = tmp_path / "bench.jsonl"
    for _ in range(2):
        assert "endor raw" in run("decode", *TOY, "--no-peers", "--codec", "raw", "--json", path)

    assert [record.subject for record in read_json_lines(path)] == 2 * [
        "non-temporal copy",
        "endor raw",
    ]


def test_json_to_standard_output_is_nothing_but_json():
    lines = run("decode", *TOY, "--no-peers", "--json", "-").splitlines()
    assert [json.loads(line)["subject"] for line in lines] == [
        "non-temporal copy",
        "endor raw",
        "endor exp",
    ]


def test_a_plot_is_a_png(tmp_path):
    path = tmp_path / "bench.png"
    run("decode", *TOY, "--plot", path)
    assert path.read_bytes().startswith(b"\x89PNG")


def test_remarks_follow_the_table():
    out = run("matvec", *TOY)
    assert "numpy float32, dense: reads float32 weights" in out.splitlines()[-1]
