"""The report as one HTML page: no scripts, no network, drawings in SVG."""

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from endor.bench.records import environment
from endor.bench.timeline import COMPUTE, Summary, summarise, timeline, within
from endor.offload.ledger import Event
from endor.offload.store import Store
from endor.sizes import size

COLOURS = {
    "read": "#e9c46a",
    "check": "#b08968",
    "expand": "#2a6f97",
    "product": "#2f6b3a",
    "host product": "#4c956c",
    "copy": "#8d99ae",
    "stall": "#c1121f",
    "kv load": "#7b5ea7",
    "kv save": "#c77dba",
    "rest": "#ced4da",
    "vram-dense": "#012a4a",
    "vram": "#2a6f97",
    "dense": "#2f6b3a",
    "decoded": "#4f9d69",
    "resident": "#74a57f",
    "host": "#4c956c",
    "disk": "#e9c46a",
}
MEANINGS = {
    "read": "read from disk",
    "check": "checksum; structure at the first read",
    "expand": "packed to dense",
    "product": "product from the packed form",
    "host product": "the same, on the processor beside a device",
    "copy": "copy to the device, until it was issued",
    "stall": "waiting for a unit",
    "rest": "torch: products, attention, norms, sampling",
    "kv load": "keys and values loaded",
    "kv save": "keys and values saved",
}
OPTIONAL = ("host product", "copy", "kv load", "kv save")
"""Kinds that are explained only where they occur."""

TIERS = {
    "vram-dense": "expanded in VRAM",
    "vram": "packed in VRAM",
    "dense": "expanded in RAM",
    "decoded": "in RAM, entropy code undone",
    "resident": "packed in RAM",
    "host": "packed in RAM, few rows multiplied there",
    "disk": "on disk, read for every step",
}
WIDTH, LANE, LEFT, ROWS = 1160, 26, 110, 400
STYLE = """
:root { color-scheme: light dark; --ink: #212529; --paper: #fff; --line: #e9ecef; --faint: #6c757d }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e9ecef; --paper: #16191d; --line: #343a40; --faint: #adb5bd }
}
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper);
       max-width: 1200px; margin: 2em auto; padding: 0 1em }
h1, p { overflow-wrap: anywhere } th, td { white-space: nowrap }
h1 { font-size: 1.5em } h2 { font-size: 1.15em; margin-top: 2em }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { text-align: right; padding: .2em .9em .2em 0; border-bottom: 1px solid var(--line) }
th:first-child, td:first-child { text-align: left }
.legend span { display: inline-block; margin-right: 1.4em }
.legend i { display: inline-block; width: .9em; height: .9em; margin-right: .4em }
svg { width: 100%; height: auto; } svg text { font-size: 12px; fill: var(--ink) }
p.small { color: var(--faint); font-size: .9em } div.scroll { max-height: 30em }
div.scroll, div.wide { overflow: auto }
div.wide svg { min-width: 700px }
@media (max-width: 600px) { body { margin: 1em auto } th, td { padding-right: .6em } }
"""


def page(
    summary: Summary,
    events: Sequence[Event],
    predicted: Mapping[str, Any],
    title: str,
    conditions: Mapping[str, str],
) -> str:
    """Return the page; `events` are those of the timeline, `conditions` what it was made under."""
    steps = len(summary.steps)
    data = json.dumps(
        summary.to_dict() | {"predicted": dict(predicted), "conditions": dict(conditions)}
    ).replace("<", "\\u003c")
    return "\n".join(
        [
            "<!doctype html>",
            f'<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<style>{STYLE}</style></head><body>",
            f"<h1>{escape(title)}</h1>",
            f"<p>{steps} step{'s' * (steps != 1)} in {summary.seconds:.2f} s. All figures are from "
            "the engine's ledger.</p>",
            _conditions(conditions),
            _speeds(summary, predicted),
            "<h2>Where the time went</h2>",
            _shares(summary),
            "<h2>The last steps</h2>",
            _legend(_meanings(events)),
            _timeline(events),
            '<p class="small">One row per thread; point at a bar for its unit. Grey is the time '
            "between two weights on the thread that computes.</p>",
            "<h2>Where the units live</h2>",
            _legend({tier: text for tier, text in TIERS.items() if tier in summary.tiers}),
            _depth(summary),
            "<h2>Units</h2>",
            _units(summary),
            f'<script type="application/json" id="endor-report">{data}</script>',
            "</body></html>",
        ]
    )


def _conditions(conditions: Mapping[str, str]) -> str:
    said = " · ".join(f"{escape(name)} {escape(text)}" for name, text in conditions.items())
    return f'<p class="small">{said}</p>'


def _speeds(summary: Summary, predicted: Mapping[str, Any]) -> str:
    rows = []
    actual = {"prefill": summary.steps[0] if summary.steps else 0.0, "decode": summary.decode_s}
    for name, seconds in actual.items():
        if not seconds:
            continue
        expected = predicted.get(f"{name}_s")
        cells = [f"{name} step", f"{seconds:.3f} s"]
        cells += [f"{expected:.3f} s", f"{seconds / expected - 1:+.0%}"] if expected else ["-", "-"]
        rows.append(cells)
    if summary.decode_s:
        rows.append(["steps a second", f"{1 / summary.decode_s:.3g}", "", ""])
    rows.append(["read from disk, a step", f"{summary.bytes_per_step / 1e9:.3f} GB", "", ""])
    doubt = f"<p>{escape(str(predicted['doubt']))}</p>" if predicted.get("doubt") else ""
    return _table(["", "actual", "predicted", "difference"], rows) + doubt


def _shares(summary: Summary) -> str:
    parts = {
        "stall": summary.stall_share,
        "expand": summary.expand_share,
        "rest": summary.rest_share,
    }
    x, out = 0.0, []
    for kind, share in parts.items():
        width = share * WIDTH
        out.append(_rect(x, 0, width, LANE, COLOURS[kind], f"{MEANINGS[kind]}: {share:.1%}"))
        x += width
    out.append(_rect(0, LANE + 6, summary.disk_share * WIDTH, LANE, COLOURS["read"], "disk busy"))
    rows = [
        ["disk busy", f"{summary.disk_share:.1%}"],
        ["rate while busy", f"{summary.disk_gbps:.2f} GB/s"],
        ["expanding, or packed products", f"{summary.expand_share:.1%}"],
        ["waiting for units", f"{summary.stall_share:.1%}"],
        ["torch and the rest", f"{summary.rest_share:.1%}"],
        ["units ready when needed", f"{summary.counters.get('hits', 0)}"],
        ["units still on their way", f"{summary.counters.get('late', 0)}"],
        ["units nobody had asked for", f"{summary.counters.get('misses', 0)}"],
        *_counts(summary.counters),
    ]
    return _svg(2 * LANE + 6, out) + _table(["share of the time", ""], rows)


def _meanings(events: Sequence[Event]) -> dict[str, str]:
    seen = {event.kind for event in events}
    return {kind: text for kind, text in MEANINGS.items() if kind not in OPTIONAL or kind in seen}


def _counts(counters: Mapping[str, Any]) -> list[list[str]]:
    """Return rows about experts, and about keys and values, where there were any to move."""
    count = defaultdict[str, Any](int, counters)
    rows = []
    if uses := count["expert_uses"]:
        rows.append(["experts in memory when chosen", f"{counters['expert_hits'] / uses:.1%}"])
        rows.append(["experts on their way then", f"{counters['expert_late'] / uses:.1%}"])
    if uses := count["hot_uses"]:
        rows.append(["experts in VRAM when chosen", f"{counters['hot_hits'] / uses:.1%}"])
        moved = f"{counters['exchanges']}, {counters['exchange_bytes'] / 1e9:.3f} GB"
        rows.append(["experts brought to VRAM to stay, and their bytes", moved])
    if choices := count["lossy_choices"]:
        rows.append(["lossy: experts replaced", f"{counters['lossy_replaced'] / choices:.1%}"])
    if neurons := count["lossy_rows"]:
        share = f"{counters['lossy_rows_named'] / neurons:.1%}"
        rows.append(["lossy: neurons predicted active", share])
    if guessed := count["guessed_uses"]:
        right = counters["right_guesses"] / guessed
        rows.append(["chosen experts that were foreseen", f"{right:.1%}"])
        reads = f"{counters['warm_reads']}, {counters['warm_wasted']}"
        rows.append(["experts read on a guess, and of these in vain", reads])
    if hosted := count["host_products"]:
        rows.append(["products on the processor beside a device", f"{hosted}"])
        rows.append(["packed bytes that they read", f"{counters['host_bytes'] / 1e9:.3f} GB"])
    if loads := count["kv_loads"]:
        rows.append(["keys and values loaded", f"{counters['kv_load_bytes'] / 1e9:.3f} GB"])
        rows.append(["keys and values saved", f"{counters['kv_save_bytes'] / 1e9:.3f} GB"])
        rows.append(
            ["layers whose keys and values were there in time", f"{counters['kv_hits']} of {loads}"]
        )
    return rows


def _timeline(events: Sequence[Event]) -> str:
    if not events:
        return "<p>No events: nothing packed was used.</p>"
    begin = min(event.start_s for event in events)
    scale = (WIDTH - LEFT) / max(max(event.stop_s for event in events) - begin, 1e-9)
    computing = {event.thread for event in events if event.kind in COMPUTE}
    copying = {event.thread for event in events if event.kind == "copy"}
    threads = sorted({event.thread for event in events}, key=lambda one: (one in computing, one))
    out, readers = [], 0
    for row, thread in enumerate(threads):
        y = row * (LANE + 8)
        readers += thread not in computing | copying
        label = f"reader {readers}" if thread not in copying else "copies"
        label = "model" if thread in computing else label
        out.append(f'<text x="0" y="{y + LANE * 0.65:.0f}">{label}</text>')
        own = sorted((e for e in events if e.thread == thread), key=lambda e: e.start_s)
        if thread in computing:
            first, last = own[0].start_s, max(event.stop_s for event in own)
            x = LEFT + (first - begin) * scale
            out.append(_rect(x, y, (last - first) * scale, LANE, COLOURS["rest"], ""))
        # A wait lies inside the expansion that it delays: draw it on top.
        for event in sorted(own, key=lambda e: e.kind == "stall"):
            x = LEFT + (event.start_s - begin) * scale
            width = (event.stop_s - event.start_s) * scale
            text = (
                f"{event.kind} {event.name}: {1e3 * (event.stop_s - event.start_s):.2f} ms, "
                f"{event.nbytes / 1e6:.1f} MB"
            )
            out.append(_rect(x, y, max(width, 0.4), LANE, COLOURS[event.kind], text))
    height = len(threads) * (LANE + 8)
    span = (WIDTH - LEFT) / scale
    for tick in range(11):
        x = LEFT + tick * (WIDTH - LEFT) / 10
        anchor = "end" if tick == 10 else "middle"
        out.append(
            f'<text x="{x:.0f}" y="{height + 14}" text-anchor="{anchor}">'
            f"{1e3 * span * tick / 10:.0f} ms</text>"
        )
    return _svg(height + 20, out)


def _depth(summary: Summary) -> str:
    if not summary.units:
        return ""
    tallest = max(row.nbytes for row in summary.units)
    width = WIDTH / len(summary.units)
    out = []
    for at, row in enumerate(summary.units):
        height = max(1.0, 90 * row.nbytes / tallest)
        text = f"{row.name}: {row.nbytes / 1e6:.1f} MB, {TIERS.get(row.tier, row.tier)}"
        colour = COLOURS.get(row.tier, "#adb5bd")
        out.append(_rect(at * width, 90 - height, max(width - 0.5, 0.5), height, colour, text))
    totals = ", ".join(
        f"{entry['units']} {TIERS.get(tier, tier)} ({size(entry['nbytes'])})"
        for tier, entry in summary.tiers.items()
    )
    return _svg(92, out) + f'<p class="small">In execution order: {escape(totals)}.</p>'


def _units(summary: Summary) -> str:
    rows = [
        [
            row.name,
            row.tier,
            f"{row.nbytes / 1e6:.2f}",
            str(row.reads),
            f"{row.read_ms:.2f}",
            f"{row.compute_ms:.2f}",
            f"{row.stall_ms:.2f}",
        ]
        for row in summary.units[:ROWS]
    ]
    header = ["unit", "tier", "packed MB", "reads", "read ms", "expand or product ms", "waited ms"]
    more = len(summary.units) - ROWS
    rest = f'<p class="small">and {more} more units in the page\'s JSON.</p>' if more > 0 else ""
    return f'<div class="scroll">{_table(header, rows)}</div>{rest}'


def _legend(entries: Mapping[str, str]) -> str:
    items = "".join(
        f'<span><i style="background:{COLOURS[kind]}"></i>{escape(text)}</span>'
        for kind, text in entries.items()
    )
    return f'<p class="legend">{items}</p>'


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    return f'<div class="wide"><table><tr>{head}</tr>{body}</table></div>'


def _rect(x: float, y: float, width: float, height: float, colour: str, text: str) -> str:
    title = f"<title>{escape(text)}</title>" if text else ""
    return (
        f'<rect x="{x:.2f}" y="{y:.2f}" width="{width:.2f}" height="{height:.2f}" '
        f'fill="{colour}">{title}</rect>'
    )


def _svg(height: float, parts: Sequence[str]) -> str:
    return f'<div class="wide"><svg viewBox="0 0 {WIDTH} {height:.0f}">{"".join(parts)}</svg></div>'


def made_under(budget: Mapping[str, str | None]) -> dict[str, str]:
    """Return the machine, the budget and the version, in words."""
    place = environment()
    memory = ", ".join(f"{name} {said or 'as found'}" for name, said in budget.items())
    return {
        "machine": f"{place.device}, {place.cores} cores, kernel {place.kernel['kernel']}",
        "budget": memory or "as found",
        "endor": f"{place.versions['endor']} {place.git_rev}".rstrip(),
    }


def write_report(
    path: Path,
    store: Store,
    *,
    seconds: tuple[float, float],
    predicted: Mapping[str, Any] | None = None,
    budget: Mapping[str, str | None] | None = None,
    title: str = "Endor",
) -> Summary:
    """Write a self-contained HTML page about a generation, and return its figures.

    Args:
        path: The page; replaced.
        store: The model's store (`model.endor`).
        seconds: When the generation began and ended, on the clock of `time.perf_counter`.
        predicted: `decode_s` and `prefill_s` of the plan, to stand beside what came.
        budget: What memory it was given, by `vram`, `ram`, ...; None where nobody said.
        title: Heading.
    """
    summary = summarise(store, seconds)
    events = timeline(within(store.ledger.events, *seconds))
    html = page(summary, events, predicted or {}, title, made_under(budget or {}))
    path.write_text(html, encoding="utf-8")
    return summary
