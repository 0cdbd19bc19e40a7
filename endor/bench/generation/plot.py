"""Pictures of streaming: a placement over depth, and systems compared. Needs matplotlib."""

from collections.abc import Sequence
from pathlib import Path

from endor.bench.generation.case import GenerateRecord
from endor.bench.plot import Bar, _figure, _save, bars
from endor.errors import ConfigError
from endor.planning.plan import Plan
from endor.planning.units import Unit

COLOURS = {
    "vram-dense": "#012a4a",
    "vram": "#2a6f97",
    "dense": "#2f6b3a",
    "decoded": "#4f9d69",
    "resident": "#74a57f",
    "host": "#4c956c",
    "disk": "#e9c46a",
}
LABELS = {
    "vram-dense": "VRAM, expanded",
    "vram": "VRAM, packed",
    "dense": "RAM, expanded",
    "decoded": "RAM, entropy code undone",
    "resident": "RAM, packed",
    "host": "RAM, multiplied there",
    "disk": "disk, read for every step",
}


def placement(units: Sequence[Unit], plan: Plan, path: Path) -> None:
    """Draw each unit at its depth, as high as its packed size, in the colour of its tier.

    Raises:
        BackendError: matplotlib is not installed.
        ConfigError: There are no units, or `path` has no picture format's suffix.
    """
    if not units:
        raise ConfigError("nothing to plot: no units")
    figure, (axes,) = _figure(path, [8])
    for tier, colour in COLOURS.items():
        inside = [unit for unit in units if plan.tiers[unit.name] == tier]
        if inside:
            axes.bar(
                [unit.index for unit in inside],
                [unit.nbytes / 1e6 for unit in inside],
                width=1.0,
                color=colour,
                label=f"{LABELS[tier]} ({len(inside)})",
            )
    axes.set_xlabel("unit, in execution order", fontsize=9)
    axes.set_ylabel("packed MB", fontsize=9)
    axes.set_xlim(-0.5, len(units) - 0.5)
    axes.set_title(
        f"decode {plan.decode_tokens_per_s:.3g} tokens/s, bound by the {plan.decode.bound}; "
        f"{plan.decode.disk_bytes / 1e9:.2f} GB from disk a step",
        fontsize=10,
        loc="left",
    )
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)
    figure.legend(loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    _save(figure, path)


def comparison(records: Sequence[GenerateRecord], path: Path) -> None:
    """Draw the tokens per second of each system; errors as for `placement`."""
    shown = [record for record in records if record.decode_s and record.system != "raw"]
    if not shown:
        raise ConfigError("nothing to plot: no system was measured")
    first = shown[0]
    entries = [
        Bar(
            record.system,
            record.tokens_per_s,
            record.system.startswith("endor"),
            f"{record.tokens_per_s:.3g} ({record.tokens_per_s / shown[-1].tokens_per_s:.2f}x)",
        )
        for record in shown
    ]
    bars(
        entries,
        path,
        title=f"{first.model}, {first.ram_bytes / 1e9:.2f} GB of memory, {first.page_cache} cache",
        axis=f"tokens/s, batch {first.batch} (x: against {shown[-1].system})",
        footnote=f"{first.environment.device}, {first.threads} threads",
    )
