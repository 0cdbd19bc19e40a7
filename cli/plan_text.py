"""A plan, for a reader."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from endor.cli.tables import table

if TYPE_CHECKING:
    from endor.hf.planned import Planned
    from endor.hf.sketch import PlannedSketch, SketchedUnit
    from endor.planning.outcome import Alternative
    from endor.planning.plan import Plan
    from endor.planning.units import Unit

    Placed = Unit | SketchedUnit

TIERS = {
    "vram-dense": "VRAM, expanded",
    "vram": "VRAM, packed",
    "dense": "RAM, expanded",
    "decoded": "RAM, entropy code undone",
    "resident": "RAM, packed",
    "host": "RAM, multiplied there",
    "disk": "disk",
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
    if result.workload.experts == "lossy":
        lines[1:1] = ["experts: lossy, replaced by others at hand; not in the prediction"]
    if result.workload.predict:
        lines[1:1] = ["predict: lossy, rows of neurons that are predicted idle are left out"]
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
    return "\n".join([*lines, *verdict(result), *best(result)])


WAYS = {
    "stream": "weights in RAM cross the link",
    "host": "some weights are multiplied in RAM, others cross the link",
    "both": "rows of each weight in RAM are multiplied there, the others cross the link",
    "experts": "experts in RAM are multiplied there, other weights cross the link",
}


def _way(each: "Alternative", *, on_device: bool) -> str:
    if not on_device:
        return "all on the processor"
    if all(tier.startswith("vram") for tier in each.placement.tiers.values()):
        return "all weights in VRAM"
    return WAYS[each.way]


def best(result: "Plan") -> list[str]:
    """Return the best ways to run the model, as a table, where there are several."""
    if len(result.alternatives) < 2:
        return []
    rows = [
        [
            _way(each, on_device=result.vram_bytes > 0)
            + (f", {each.expanded:.0%} expanded" if each.expanded else ""),
            str(each.batch),
            each.kv,
            f"{each.decode_tokens_per_s:.3g}",
            f"{each.decode_tokens_per_s / each.batch:.3g}",
            f"{each.prefill_tokens_per_s:.3g}",
            each.bound,
        ]
        for each in result.alternatives
    ]
    columns = ["best ways, this plan's first", "batch", "kv", "decode tok/s", "of each sequence"]
    return ["", table([*columns, "prefill tok/s", "bound by"], rows)]


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
    from endor.planning.cost import JOIN
    from endor.planning.device_rates import MOST_ROWS, modelled
    from endor.planning.machine import disturbance

    machine, disk, result = planned.machine, planned.disk, planned.plan
    rows = [
        ["disk, cold reads", f"{disk.read_gbps:.2f} GB/s"],
        ["  over its passes", f"{disk.slowest_gbps:.2f} to {disk.fastest_gbps:.2f} GB/s"],
        ["memory read / copy", f"{machine.read_gbps:.1f} / {machine.copy_gbps:.1f} GB/s"],
        ["dense product, batch 1", f"{machine.linear_gbps:.1f} GB/s"],
        ["  by Endor, for the head", f"{machine.plain_gbps:.1f} GB/s"],
        ["dense product, long prompt", f"{machine.gemm_gflops:.0f} Gflop/s"],
        ["  in float32", f"{machine.float32_gflops:.0f} Gflop/s"],
        ["checksums, one thread", f"{machine.checksum_gbps:.1f} GB/s"],
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
    if text := disturbance(machine, disk):
        lines.append(text)
    direct = result.workload.product == "direct"
    if direct and result.vram_bytes and machine.link is not None:
        for kind, (one, most) in modelled(machine.link.name).items():
            lines.append(
                f"device's product {kind}: {one:.0f} to {most:.0f} G weights/s of 1 to {MOST_ROWS} "
                "rows, by the model of docs/benchmarks/gpu.md, not measured"
            )
    if direct and not result.vram_bytes:
        lines += ["", *ways(result)]
    if result.way != "stream":
        hosted = [name for name, tier in result.tiers.items() if tier == "host"]
        shares = [result.host_shares.get(name, 1.0) for name in hosted]
        lines += [
            "",
            f"the host multiplies {max(shares):.0%} of the rows of {len(hosted)} units, up to "
            f"{max(result.products.packed_rows.values())} rows of input",
        ]
    if result.kept_bytes:
        nbytes = sum(result.kept_bytes.values())
        lies, stays = ("in RAM", "VRAM") if result.vram_bytes else ("on disk", "RAM")
        lines += [
            "",
            f"of {len(result.kept_bytes)} matrices stored by neuron, {lies}, {nbytes / 1e6:.0f} MB "
            f"are in {stays}: what their busiest neurons need, by the counts of the checkpoint; a "
            f"step reads {result.decode.disk_bytes / 1e6:.1f} MB from disk",
        ]
    if result.exchanges is not None:
        lines += [
            "",
            "experts change places with those in VRAM: a use there saves "
            f"{result.exchanges.gain:.2f} of a copy, up to {result.exchanges.step_bytes / 1e6:.0f} "
            "MB are copied for that in a step",
        ]
    for name, step in (("decode", result.decode), ("prefill", result.prefill)):
        main = next(place for place in step.resources if place != "disk" and place != "link")
        parts = " + ".join(f"{what} {seconds:.4f}" for what, seconds in step.parts.items())
        joins = f"{JOIN:g}-norm" if main == "cpu" else "max"
        times = ", ".join(f"{place} {seconds:.4f}" for place, seconds in step.resources.items())
        lines += [
            "",
            f"{name}: {main} = {parts}",
            f"  {joins}({times}) + unhidden {step.unhidden:.4f} = {step.seconds:.4f} s",
        ]
        if step.disk_bytes:
            lines.append(f"  disk = {step.disk_bytes / 1e9:.3f} GB / {disk.read_gbps:.2f} GB/s")
        if step.host_bytes:
            lines.append(
                f"  memory = ({step.host_bytes / 1e9:.3f} GB multiplied + "
                f"{step.link_bytes / 1e9:.3f} GB copied) / {machine.read_gbps:.1f} GB/s"
            )
    return "\n".join(lines)


def tier_bytes(units: "Sequence[Placed]", result: "Plan") -> dict[str, tuple[int, int]]:
    """Return (units, bytes they take there) per tier, fastest first."""
    out = {}
    bytes_in = dict.fromkeys(TIERS, "nbytes")
    bytes_in |= {"dense": "dense_nbytes", "vram-dense": "dense_nbytes", "decoded": "decoded_nbytes"}
    for tier in TIERS:
        inside = [unit for unit in units if result.tiers[unit.name] == tier]
        out[tier] = (len(inside), sum(getattr(unit, bytes_in[tier]) for unit in inside))
    return out
