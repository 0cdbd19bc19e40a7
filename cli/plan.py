"""`endor plan`: where a packed checkpoint's weights would live, and how fast it would run."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

import click

from endor.cli.common import loading_options
from endor.cli.tables import table
from endor.cli.terminal import echo, show

if TYPE_CHECKING:
    from endor.hf.config import Loading
    from endor.hf.outline import Planned
    from endor.hf.sketch import PlannedSketch, SketchedUnit
    from endor.planning.catalogue import Described
    from endor.planning.plan import Plan
    from endor.planning.units import Unit

    Placed = Unit | SketchedUnit

SKETCHED_BITS = (4.0, 3.5, 3.0)
"""What a model that is not packed is planned with, beside lossless and half pruned."""

TIERS = {
    "vram-dense": "VRAM, expanded",
    "vram": "VRAM, packed",
    "dense": "RAM, expanded",
    "resident": "RAM, packed",
    "disk": "disk",
}


@click.command("plan")
@click.argument("model", type=click.Path(exists=True, path_type=Path))
@loading_options("vram", "ram", "context", "prompt", "batch", "exact", "kv")
@click.option(
    "--for",
    "--gpu",
    "machine_name",
    metavar="MACHINE",
    help="Plan for a machine that is not at hand, such as rtx4090; `--for list` shows them.",
)
@click.option(
    "--sparsity", type=float, metavar="0..1", help="Of a MODEL that is not packed: pruned so far."
)
@click.option("--bits", type=float, metavar="BITS", help="Of such a MODEL: bits a weight.")
@click.option("--disk", "disk_gbps", type=float, metavar="GB/s", help="With --for: another disk.")
@click.option("--remeasure", is_flag=True, help="Measure machine and disk again.")
@click.option("--explain", is_flag=True, help="Print the arithmetic.")
@click.option(
    "--plot",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE.png",
    help="Draw the placement over depth (needs matplotlib).",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def plan_command(
    model: Path,
    trust_remote_code: bool,
    machine_name: str | None,
    sparsity: float | None,
    bits: float | None,
    disk_gbps: float | None,
    remeasure: bool,
    explain: bool,
    plot: Path | None,
    as_json: bool,
    **options: Unpack["Loading"],
) -> None:
    """Place MODEL in VRAM, RAM and on disk, and predict its speed.

    Nothing is loaded: the headers of a packed checkpoint, or the config.json of any model, and
    measured constants of this machine are enough. The constants are remembered; `endor bench hw`
    shows them. A MODEL that is not packed is planned for as `endor pack` would make it: with
    --sparsity or --bits, or with each of several ways.
    """
    from endor.hf.model import is_packed

    target = _target(machine_name, disk_gbps)
    if machine_name == "list":
        return
    if not (model.is_dir() and is_packed(model)):
        sketched(model, target, sparsity, bits, trust_remote_code, as_json, explain, options)
        return
    if sparsity is not None or bits is not None:
        raise click.UsageError(f"--sparsity and --bits are for models that are not packed: {model}")
    from endor.hf.outline import plan_checkpoint

    planned = plan_checkpoint(
        model,
        remeasure=remeasure,
        trust_remote_code=trust_remote_code,
        target=target,
        **options,
    )
    found, result = planned.outline, planned.plan
    if plot is not None:
        from endor.bench.generation.plot import placement

        placement(found.units, result, plot)
    if as_json:
        echo(json.dumps(to_dict(planned), indent=2))
        return
    show(summary(found.name, found.units, result, found.expanded, found.expanded_nbytes))
    if explain:
        show("\n" + arithmetic(planned))


def _target(name: str | None, disk_gbps: float | None) -> "Described | None":
    """Return the machine that `--for` names, and print all of them for `list`."""
    from endor.planning.catalogue import MACHINES, changed, described

    if name is None:
        if disk_gbps is not None:
            raise click.UsageError("--disk changes the disk of a machine that --for names")
        return None
    if name != "list":
        return changed(described(name), disk_gbps=disk_gbps)
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
    model: Path,
    target: "Described | None",
    sparsity: float | None,
    bits: float | None,
    trust_remote_code: bool,
    as_json: bool,
    explain: bool,
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
            planned.append(plan_sketch(found, way, target=target, **options))
        except BudgetError as error:
            if len(ways) == 1:
                raise
            refused.append((way, str(error)))
    if as_json:
        made = [sketch_to_dict(each) for each in planned]
        echo(json.dumps({"model": found.name, "machine": where, "ways": made}, indent=2))
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
        ]
        for each in planned
    ]
    columns = ["packed", "bits", "GB", "where", "decode tok/s", "prefill tok/s", "bound by"]
    show(f"{found.name}, {size}, on {where}, predicted\n\n{table(columns, rows)}")
    for way, why in refused:
        show(f"{way.label}: {why}")
    show("\nwhat each costs in quality: docs/benchmarks/quality.md; --bits or --sparsity plans one")


def places(units: "Sequence[Placed]", result: "Plan") -> str:
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
        "load_s": result.load_s,
    }


def summary(
    name: str,
    units: "Sequence[Placed]",
    result: "Plan",
    expanded: Sequence[str] = (),
    expanded_nbytes: int = 0,
) -> str:
    """Return the plan for a reader."""
    from endor.sizes import size

    ratio = result.dense_bytes / max(1, result.packed_bytes)
    lines = [
        f"{name}: {len(units)} units, {result.packed_bytes / 1e9:.2f} GB packed, "
        f"{result.dense_bytes / 1e9:.2f} GB expanded ({ratio:.2f}x)",
        "",
    ]
    if expanded:
        lines[1:1] = [
            f"packed but expanded at load: {len(expanded)} tensors, {expanded_nbytes / 1e9:.2f} GB"
        ]
    budgets = [("ram", result.ram_bytes), ("vram", result.vram_bytes)]
    reserved = [
        [item.what, item.where, size(item.nbytes)] for item in result.reservations if item.nbytes
    ]
    rows = reserved + [
        [f"units in {TIERS[tier]}", "vram" if tier.startswith("vram") else "ram", size(nbytes)]
        for tier, (_, nbytes) in tier_bytes(units, result).items()
        if tier != "disk" and nbytes
    ]
    rows += [[f"{where} budget", where, size(nbytes)] for where, nbytes in budgets if nbytes]
    lines += [table(["memory", "where", "size"], rows), ""]
    total = max(1, len(units))
    rows = [
        [TIERS[tier], str(count), f"{count / total:.0%}", f"{nbytes / 1e9:.2f}"]
        for tier, (count, nbytes) in tier_bytes(units, result).items()
        if count
    ]
    lines += [table(["tier", "units", "share", "GB"], rows), ""]
    load, prefill, decode = result.load_s, result.prefill, result.decode
    tokens = result.workload.batch * result.workload.prompt
    lines += [
        f"load     {load:.1f} s: what stays in memory, read once",
        f"prefill  {result.prefill_tokens_per_s:.3g} tokens/s ({tokens} tokens in "
        f"{prefill.seconds:.3g} s), bound by the {prefill.bound}",
        f"decode   {result.decode_tokens_per_s:.3g} tokens/s ({decode.seconds:.3g} s a step), "
        f"bound by the {decode.bound}; {decode.disk_bytes / 1e9:.2f} GB from disk a step",
    ]
    return "\n".join([*lines, *verdict(result)])


def verdict(result: "Plan") -> list[str]:
    """Return what to say about the plain dense model."""
    dense = result.dense_decode
    if dense is None:
        return ["dense    does not fit these budgets"]
    text = f"dense    an ordinary resident model fits and would take {dense.seconds:.3g} s a step"
    if not result.dense_is_faster:
        return [f"{text}: {dense.seconds / result.decode.seconds:.2f}x the time of this plan"]
    advice = "" if result.workload.product == "direct" else ", or try --fast"
    return [f"{text}: at least as fast; unpack the checkpoint if memory is not scarce{advice}"]


def ways(result: "Plan") -> list[str]:
    """Return how units are multiplied, by the number of input rows."""
    from endor.planning.products import NEVER, PRODUCT_ROWS

    packed = [name for name, tier in result.tiers.items() if tier != "dense"]
    rows = [result.products.packed_rows[name] for name in packed]
    lines = []
    for limit in sorted(set(rows), reverse=True):
        count = rows.count(limit)
        if limit:
            upto = "1 row" if limit == 1 else f"1 to {limit} rows"
            more = "" if limit == PRODUCT_ROWS else ", expanded from there on"
            lines.append(f"{count} units: {upto} multiplied from the packed form{more}")
        else:
            lines.append(f"{count} units: expanded and multiplied, which is faster here")
    wide = result.products.wide_rows
    if wide < NEVER:
        lines.append(f"expanded units are multiplied in float32 from {wide} rows on")
    return lines


def arithmetic(planned: "Planned | PlannedSketch") -> str:
    """Return the constants, and how they become the predicted times."""
    machine, disk, result = planned.machine, planned.disk, planned.plan
    rows = [
        ["disk, cold reads", f"{disk.read_gbps:.2f} GB/s"],
        ["  over its passes", f"{disk.slowest_gbps:.2f} to {disk.fastest_gbps:.2f} GB/s"],
        ["memory read / copy", f"{machine.read_gbps:.1f} / {machine.copy_gbps:.1f} GB/s"],
        ["dense product, batch 1", f"{machine.linear_gbps:.1f} GB/s"],
        ["  by Endor, for the head", f"{machine.plain_gbps:.1f} GB/s"],
        ["dense product, long prompt", f"{machine.gemm_gflops:.0f} Gflop/s"],
        ["  in float32", f"{machine.float32_gflops:.0f} Gflop/s"],
        ["small operation", f"{machine.op_us:.1f} us"],
    ]
    for kind, rate in machine.expand_gbps.items():
        rows.append([f"expand {kind}, dense bytes", f"{rate:.1f} GB/s"])
    for kind, rate in machine.product_gbps.items():
        rows.append([f"product {kind}, packed bytes", f"{rate:.1f} GB/s"])
    if machine.link is not None and result.vram_bytes:
        rows += [
            [f"link to {machine.link.name}", f"{machine.link.h2d_gbps:.1f} GB/s"],
            ["device memory", f"{machine.link.hbm_gbps:.0f} GB/s"],
        ]
    when = machine.measured or "never; typical ones"
    lines = [
        table([f"constant ({machine.dtype}, {machine.threads} threads)", "value"], rows),
        f"measured: {when}, kernel {machine.kernel or 'unknown'}",
    ]
    if result.workload.product == "direct" and not result.vram_bytes:
        lines += ["", *ways(result)]
    for name, step in (("decode", result.decode), ("prefill", result.prefill)):
        main = next(place for place in step.resources if place != "disk" and place != "link")
        parts = " + ".join(f"{what} {seconds:.4f}" for what, seconds in step.parts.items())
        times = ", ".join(f"{place} {seconds:.4f}" for place, seconds in step.resources.items())
        lines += [
            "",
            f"{name}: {main} = {parts}",
            f"  max({times}) + unhidden {step.unhidden:.4f} = {step.seconds:.4f} s",
        ]
        if step.disk_bytes:
            lines.append(f"  disk = {step.disk_bytes / 1e9:.3f} GB / {disk.read_gbps:.2f} GB/s")
    return "\n".join(lines)


def tier_bytes(units: "Sequence[Placed]", result: "Plan") -> dict[str, tuple[int, int]]:
    """Return (units, bytes they take there) per tier, fastest first."""
    out = {}
    for tier in TIERS:
        inside = [unit for unit in units if result.tiers[unit.name] == tier]
        dense = tier in ("dense", "vram-dense")
        out[tier] = (len(inside), sum(u.dense_nbytes if dense else u.nbytes for u in inside))
    return out


def to_dict(planned: "Planned") -> dict[str, Any]:
    """Return the plan for machines."""
    found, result = planned.outline, planned.plan
    return {
        "model": found.name,
        "units": len(found.units),
        "expanded_at_load": list(found.expanded),
        "packed_bytes": result.packed_bytes,
        "dense_bytes": result.dense_bytes,
        "budgets": {"ram_bytes": result.ram_bytes, "vram_bytes": result.vram_bytes},
        "workload": asdict(result.workload),
        "reservations": [asdict(item) for item in result.reservations],
        "staging_bytes": result.staging_bytes,
        "tiers": dict(result.tiers),
        "decode": asdict(result.decode) | {"tokens_per_s": result.decode_tokens_per_s},
        "prefill": asdict(result.prefill) | {"tokens_per_s": result.prefill_tokens_per_s},
        "load_s": result.load_s,
        "dense_decode_s": result.dense_decode.seconds if result.dense_decode else None,
        "dense_is_faster": result.dense_is_faster,
        "machine": planned.machine.to_dict(),
        "disk": asdict(planned.disk),
    }
