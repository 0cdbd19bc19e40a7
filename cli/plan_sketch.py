"""`endor plan` of a model that is not packed, and of a machine that is not at hand."""

from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import click

from endor.cli.plan_goal import most_sequences
from endor.cli.plan_text import TIERS, arithmetic, summary, tier_bytes
from endor.cli.tables import table
from endor.cli.terminal import emit, show

if TYPE_CHECKING:
    from pathlib import Path

    from endor.hf.config import Loading
    from endor.hf.sketch import PlannedSketch, SketchedUnit
    from endor.planning.catalogue import Described
    from endor.planning.plan import Plan
    from endor.planning.search import Goal

SKETCHED_BITS = (4.0, 3.5, 3.0)
"""What a model that is not packed is planned with, beside lossless and half pruned."""


def find_target(name: str | None, disk_gbps: float | None) -> "Described | None":
    """Return the machine that `--for` names, and print all of them for `list`."""
    from endor.planning.catalogue import MACHINES, described

    if name is None:
        if disk_gbps is not None:
            raise click.UsageError("--disk changes the disk of a machine that --for names")
        return None
    if name != "list":
        found = described(name)
        return found if disk_gbps is None else replace(found, disk_gbps=disk_gbps)
    rows = [
        [
            each.name,
            each.device,
            f"{each.vram_gib:g} GiB, {each.vram_gbps:g} GB/s",
            f"{each.h2d_gbps:g} GB/s",
            f"{each.ram_gib:g} GiB, {each.ram_gbps:g} GB/s",
            f"{each.disk_gbps:g} GB/s",
            each.source,
        ]
        for each in MACHINES.values()
    ]
    show(table(["--for", "device", "VRAM", "link", "RAM", "disk", "source of the device's"], rows))
    return None


def sketched(
    model: "Path",
    target: "Described | None",
    sparsity: float | None,
    bits: float | None,
    trust_remote_code: bool,
    as_json: bool,
    explain: bool,
    goal: "Goal",
    options: "Loading",
) -> None:
    """Plan for a model that is not packed: one way of packing it, or a table of several."""
    from endor.errors import BudgetError
    from endor.hf.sketch import plan_sketch, sketch
    from endor.planning.sketch import method

    found = sketch(model, trust_remote_code=trust_remote_code)
    if sparsity is not None or bits is not None:
        ways = [method(sparsity=sparsity, bits=bits)]
    else:
        ways = [method(), *(method(bits=each) for each in SKETCHED_BITS)]
        ways.insert(1, method(sparsity=0.5))
    where = target.device if target else "this machine"
    planned, refused = [], []
    for way in ways:
        try:
            most = most_sequences(goal)
            planned.append(
                plan_sketch(found, way, target=target, goal=goal, most_sequences=most, **options)
            )
        except BudgetError as error:
            if len(ways) == 1:
                raise
            refused.append((way, str(error)))
    if as_json:
        made = [sketch_to_dict(each) for each in planned]
        emit({"model": found.name, "machine": where, "ways": made}, indent=2)
        return
    size = f"{found.parameters / 1e9:.1f} G parameters"
    if len(ways) == 1:
        result = planned[0].plan
        show(summary(f"{found.name}, {size}, {ways[0].label}", planned[0].units, result))
        show(f"\npredicted for {where}, of which nothing was measured" if target else "")
        if explain:
            show("\n" + arithmetic(planned[0]))
        return
    rows = [
        [
            each.method.label,
            f"{each.method.bits:.2f}",
            f"{each.plan.packed_bytes / 1e9:.1f}",
            places(each.units, each.plan),
            f"{each.plan.decode_tokens_per_s:.3g}",
            f"{each.plan.prefill_tokens_per_s:.3g}",
            each.plan.decode.bound,
            str(each.plan.workload.batch),
        ]
        for each in planned
    ]
    columns = [
        "packed",
        "bits",
        "GB",
        "where",
        "decode tok/s",
        "prefill tok/s",
        "bound by",
        "batch",
    ]
    show(f"{found.name}, {size}, on {where}, predicted\n\n{table(columns, rows)}")
    for way, why in refused:
        show(f"{way.label}: {why}")
    show("\nwhat each costs in quality: docs/benchmarks/quality.md; --bits or --sparsity plans one")


def places(units: "Sequence[SketchedUnit]", result: "Plan") -> str:
    """Return where the bytes are, in a few words."""
    found = tier_bytes(units, result)
    total = sum(nbytes for _, nbytes in found.values()) or 1
    shares = {tier: nbytes / total for tier, (_, nbytes) in found.items() if nbytes}
    return ", ".join(f"{share:.0%} {TIERS[tier]}" for tier, share in shares.items())


def sketch_to_dict(planned: "PlannedSketch") -> dict[str, Any]:
    """Return a sketch's plan for machines."""
    result = planned.plan
    return {
        "packed": planned.method.label,
        "bits": planned.method.bits,
        "packed_bytes": result.packed_bytes,
        "dense_bytes": result.dense_bytes,
        "budgets": {"ram_bytes": result.ram_bytes, "vram_bytes": result.vram_bytes},
        "tiers": {
            tier: {"units": count, "bytes": nbytes}
            for tier, (count, nbytes) in tier_bytes(planned.units, result).items()
        },
        "decode": asdict(result.decode) | {"tokens_per_s": result.decode_tokens_per_s},
        "prefill": asdict(result.prefill) | {"tokens_per_s": result.prefill_tokens_per_s},
        "batch": result.workload.batch,
        "load_s": result.load_s,
    }
