import sys

import pytest

from endor.bench.cpu.decode import decode
from endor.bench.plot import Bar, Point, bars, quality, rates
from endor.errors import BackendError, ConfigError

PNG = b"\x89PNG"
BARS = [Bar("dense bf16", 16, False, "16.0"), Bar("endor", 6.1, True, "6.1")]


def test_rates_draws_every_benchmark(toy, tmp_path):
    path = tmp_path / "rates.png"
    rates(decode(toy).records, path)
    assert path.read_bytes().startswith(PNG)


def test_bars_and_quality_draw(tmp_path):
    first, second = tmp_path / "bars.png", tmp_path / "quality.png"
    bars(BARS, first, title="Sizes", axis="bits per weight", footnote="Computed.")
    quality([Point("dense", 16.0, 20.0), Point("half", 6.1, 500.0)], second, title="Quality")
    assert first.read_bytes().startswith(PNG)
    assert second.read_bytes().startswith(PNG)


def test_vector_formats_are_taken(tmp_path):
    path = tmp_path / "bars.svg"
    bars(BARS, path, title="Sizes", axis="bits per weight")
    assert b"<svg" in path.read_bytes()


def test_nothing_to_plot_is_an_error(tmp_path):
    path = tmp_path / "plot.png"
    for draw in (
        lambda: rates([], path),
        lambda: bars([], path, title="", axis=""),
        lambda: quality([], path, title=""),
    ):
        with pytest.raises(ConfigError, match="nothing to plot"):
            draw()


def test_another_suffix_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"plot must end in \.png"):
        bars(BARS, tmp_path / "bars.docx", title="", axis="")


def test_a_missing_matplotlib_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(BackendError, match="plots need matplotlib"):
        bars(BARS, tmp_path / "bars.png", title="", axis="")
