"""`endor plan`: where a packed checkpoint's weights would live, and how fast it would run."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

import click

from endor.cli.common import MODEL, json_option, loading_options
from endor.cli.hub import revision_option
from endor.cli.plan_goal import goal_option, most_sequences
from endor.cli.plan_sketch import find_target, sketched
from endor.cli.plan_text import arithmetic, summary
from endor.cli.terminal import emit, show

if TYPE_CHECKING:
    from endor.hf.config import Loading
    from endor.hf.planned import Planned
    from endor.hf.sketch import SketchedUnit
    from endor.planning.plan import Alternative
    from endor.planning.search import Goal
    from endor.planning.units import Unit

    Placed = Unit | SketchedUnit


@click.command("plan")
@click.argument("model", required=False, type=MODEL)
@loading_options(
    *("vram", "ram", "context", "prompt", "batch"),
    *("exact", "host_compute", "experts", "predict", "kv"),
)
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
@goal_option
@click.option("--remeasure", is_flag=True, help="Measure machine and disk again.")
@click.option("--explain", is_flag=True, help="Print the arithmetic.")
@click.option(
    "--plot",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE.png",
    help="Draw the placement over depth (needs matplotlib).",
)
@revision_option
@json_option
def plan_command(
    model: Path | None,
    trust_remote_code: bool,
    machine_name: str | None,
    sparsity: float | None,
    bits: float | None,
    disk_gbps: float | None,
    goal: "Goal",
    remeasure: bool,
    explain: bool,
    plot: Path | None,
    revision: str | None,
    as_json: bool,
    **options: Unpack["Loading"],
) -> None:
    """Place MODEL in VRAM, RAM and on disk, and predict its speed.

    Nothing is loaded: the headers of a packed checkpoint, or the config.json of any model, and
    measured constants of this machine are enough; of a model on the Hub (org/name) only these are
    fetched. The constants are remembered; `endor bench hw` shows them. A MODEL that is not packed
    is planned for as `endor pack` would make it: with --sparsity or --bits, or with each of several
    ways.
    """
    from endor.checkpoint.loadable import is_packed
    from endor.sharing.headers import headers_at_hand

    target = find_target(machine_name, disk_gbps)
    if machine_name == "list":
        return
    if model is None:
        raise click.UsageError("Missing argument 'MODEL': a directory, a config.json, or an id")
    given = model
    model, probe = click.get_current_context().with_resource(
        headers_at_hand(given, revision, probe=target is None)
    )
    if not (model.is_dir() and is_packed(model)):
        if options["predict"]:
            raise click.UsageError(f"--predict is for packed checkpoints with predictors: {given}")
        sketched(model, target, sparsity, bits, trust_remote_code, as_json, explain, goal, options)
        return
    if sparsity is not None or bits is not None:
        raise click.UsageError(f"--sparsity and --bits are for models that are not packed: {given}")
    from endor.hf.planned import plan_checkpoint
    from endor.planning.machine import disturbance

    planned = plan_checkpoint(
        model,
        goal=goal,
        most_sequences=most_sequences(goal),
        remeasure=remeasure,
        trust_remote_code=trust_remote_code,
        target=target,
        disk_file=probe,
        **options,
    )
    found, result = planned.outline, planned.plan
    if plot is not None:
        from endor.bench.generation.plot import placement

        placement(found.units, result, plot)
    if as_json:
        emit(to_dict(planned), indent=2)
        return
    show(summary(found.name, found.units, result, found.expanded, found.expanded_nbytes))
    if explain:
        show("\n" + arithmetic(planned))
    elif text := disturbance(planned.machine, planned.disk):
        show("\n" + text)


def alternative_to_dict(each: "Alternative") -> dict[str, Any]:
    """Return one of a plan's best ways, but for the place of every unit."""
    return {
        "way": each.way,
        "batch": each.batch,
        "kv": each.kv,
        "expanded": each.expanded,
        "decode_tokens_per_s": each.decode_tokens_per_s,
        "prefill_tokens_per_s": each.prefill_tokens_per_s,
        "bound": each.bound,
    }


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
        "way": result.way,
        "alternatives": [alternative_to_dict(each) for each in result.alternatives],
        "load_s": result.load_s,
        "dense_decode_s": result.dense_decode.seconds if result.dense_decode else None,
        "dense_is_faster": result.dense_is_faster,
        "machine": planned.machine.to_dict(),
        "disk": asdict(planned.disk),
    }
