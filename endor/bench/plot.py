"""Plots of benchmark records and evaluations, as PNG files. Needs matplotlib (`endor[plot]`)."""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from endor.bench.records import BenchRecord
from endor.errors import BackendError, ConfigError

OURS = "#2a6f97"
PEERS = "#adb5bd"
LIMIT = "#c1121f"
INK = "#212529"


@dataclass(frozen=True, slots=True)
class Bar:
    """One bar of `bars`: its label, its length, whether it is ours, and the text at its end."""

    label: str
    value: float
    ours: bool
    text: str


@dataclass(frozen=True, slots=True)
class Point:
    """One model in `quality`: bits per weight, perplexity, and what to call it.

    Points of one series are joined and named in a legend; a label then says what differs in it.
    """

    label: str
    bits_per_weight: float
    perplexity: float
    series: str = ""


def rates(records: Sequence[BenchRecord], path: Path) -> None:
    """Plot GB/s of each record's traffic, one panel per benchmark, with the ceiling drawn in.

    Raises:
        BackendError: matplotlib is not installed.
        ConfigError: No records, or `path` has no picture format's suffix.
    """
    if not records:
        raise ConfigError("nothing to plot: no records")
    groups: dict[str, list[BenchRecord]] = {}
    for record in records:
        groups.setdefault(record.bench, []).append(record)
    figure, panels = _figure(path, [len(group) for group in groups.values()])
    for axes, (bench, group) in zip(panels, groups.items(), strict=True):
        ceiling = max(record.ceiling_gbps for record in group)
        _bars(
            axes,
            [
                Bar(
                    record.subject,
                    record.gbps,
                    record.subject.startswith("endor"),
                    f"{record.gbps:.2f}",
                )
                for record in group
            ],
        )
        if ceiling:
            axes.axvline(ceiling, color=LIMIT, linewidth=1, linestyle="--", zorder=1)
        shape = " x ".join(str(size) for size in group[0].shape)
        threads = f"{group[0].threads} thread{'s' if group[0].threads > 1 else ''}"
        what = f"{shape} {group[0].dtype}" if bench != "io" else f"{group[0].shape[0] / 1e9:.2f} GB"
        density = f", density {group[0].density:g}" if bench != "io" else ""
        axes.set_title(f"{bench}: {what}{density}, {threads}", fontsize=10, loc="left")
        axes.set_xlabel(f"GB/s (dashed: {group[0].ceiling})" if ceiling else "GB/s", fontsize=9)
    _foot(figure, records[0].environment.device)
    _save(figure, path)


def bars(entries: Sequence[Bar], path: Path, *, title: str, axis: str, footnote: str = "") -> None:
    """Plot horizontal bars; errors as for `rates`."""
    if not entries:
        raise ConfigError("nothing to plot: no bars")
    figure, (axes,) = _figure(path, [len(entries)])
    _bars(axes, entries)
    axes.set_title(title, fontsize=11, loc="left")
    axes.set_xlabel(axis, fontsize=9)
    if footnote:
        _foot(figure, footnote)
    _save(figure, path)


def quality(points: Sequence[Point], path: Path, *, title: str) -> None:
    """Plot perplexity against bits per weight, logarithmic in perplexity; errors as for `rates`."""
    if not points:
        raise ConfigError("nothing to plot: no models")
    figure, (axes,) = _figure(path, [10])
    names = list(dict.fromkeys(point.series for point in points))
    for name in names:
        series = sorted((p for p in points if p.series == name), key=lambda p: p.bits_per_weight)
        axes.plot(
            [point.bits_per_weight for point in series],
            [point.perplexity for point in series],
            color=OURS if names == [""] else None,
            linestyle="-" if name else "",
            linewidth=1,
            marker="o",
            markersize=6,
            label=name,
            zorder=3,
        )
        for point in series:
            axes.annotate(
                point.label,
                (point.bits_per_weight, point.perplexity),
                xytext=(6, 5),
                textcoords="offset points",
                fontsize=8,
            )
    if any(names):
        axes.legend(fontsize=8, frameon=False)
    axes.set_yscale("log")
    ticker = import_module("matplotlib.ticker")
    axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(ticker.NullFormatter())
    axes.margins(x=0.2, y=0.2)
    axes.grid(color="#e9ecef", zorder=0)
    axes.set_title(title, fontsize=11, loc="left")
    axes.set_xlabel("bits per weight", fontsize=9)
    axes.set_ylabel("perplexity", fontsize=9)
    _save(figure, path)


def _figure(path: Path, heights: Sequence[int]) -> tuple[Any, list[Any]]:
    if path.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise ConfigError(f"{path}: a plot must end in .png, .svg or .pdf")
    try:
        figures = import_module("matplotlib.figure")
    except ImportError:
        raise BackendError("plots need matplotlib: pip install 'endor-sparse[plot]'") from None
    # Without pyplot: no global state, no display, safe in a library.
    figure = figures.Figure(
        figsize=(8, sum(0.34 * height + 1.1 for height in heights)), layout="constrained"
    )
    panels = figure.subplots(len(heights), 1, squeeze=False, height_ratios=[h + 1 for h in heights])
    return figure, [row[0] for row in panels]


def _bars(axes: Any, entries: Sequence[Bar]) -> None:
    places = range(len(entries))
    widths = [entry.value for entry in entries]
    colours = [OURS if entry.ours else PEERS for entry in entries]
    axes.barh(places, widths, color=colours, height=0.72, zorder=2)
    for place, entry in zip(places, entries, strict=True):
        axes.annotate(
            entry.text,
            (entry.value, place),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
            color=INK,
        )
    axes.set_yticks(places, [entry.label for entry in entries], fontsize=9)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.18 * max(widths))
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(axis="x", labelsize=8)


def _foot(figure: Any, text: str) -> None:
    """Put a small remark below everything; the layout keeps room for it."""
    figure.supxlabel(text, x=0.01, ha="left", fontsize=7, color="#6c757d")


def _save(figure: Any, path: Path) -> None:
    figure.savefig(path, dpi=150)
