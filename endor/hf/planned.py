"""The plan for a packed checkpoint, made without loading a weight."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Unpack

from endor.hf.config import Loading, settled, spelled_out, workload
from endor.hf.predicted import open_predictors
from endor.models.outline import Outline, outline
from endor.planning import available_bytes
from endor.planning import machine as hardware
from endor.planning.catalogue import Described
from endor.planning.constants import Disk, Machine
from endor.planning.plan import Plan
from endor.planning.search import MOST_SEQUENCES, Goal, search
from endor.planning.unit_cost import unit_costs


@dataclass(frozen=True, slots=True)
class Planned:
    """A plan, and all that it was made from."""

    outline: Outline
    machine: Machine
    disk: Disk
    plan: Plan


@spelled_out
def plan_checkpoint(
    packed_dir: Path | str,
    *,
    remeasure: bool = False,
    trust_remote_code: bool = False,
    target: Described | None = None,
    goal: Goal = "latency",
    most_sequences: int = MOST_SEQUENCES,
    disk_file: Path | None = None,
    **options: Unpack[Loading],
) -> Planned:
    """Return the plan for a packed checkpoint on this machine, measuring what is not remembered.

    Pass `plan.placement` to `endor.load_model` to have it come true.

    Args:
        packed_dir: The checkpoint.
        remeasure: Measure the machine and the disk again.
        trust_remote_code: As for `outline`.
        target: A machine that is not at hand, instead of this one, with all its memory where
            `ram` and `vram` do not say how much.
        goal: What is to be best; for throughput the batch is searched for.
        most_sequences: The largest batch then.
        disk_file: What to measure the disk by, where the checkpoint has headers only.
        options: As for `load_model`, of which planning needs memory, arithmetic and what is planned
            for; without `vram` the plan is for the processor.

    Raises:
        BudgetError: A budget is too small; the message has the least that works.
        ConfigError: No packed checkpoint, or options that make no sense.
        FormatError: A header is damaged.
    """
    given, purpose = settled(options), workload(options)
    ram, vram = given["ram"], given["vram"]
    on_device = bool(vram or (target is not None and vram is None and target.vram_bytes))
    found = outline(packed_dir, trust_remote_code=trust_remote_code, on_device=on_device)
    if purpose.predict:
        predictors = open_predictors(
            found.path, list({unit.layout.path: unit.layout for unit in found.units}.values())
        )
        purpose = replace(purpose, named=predictors.named)
    if target is None:
        machine = hardware.machine(found.dtype, refresh=remeasure)
        disk = hardware.disk(disk_file or packed_dir, refresh=remeasure)
    else:
        machine, disk = target.machine(found.dtype), target.disk
        ram = target.ram_bytes if ram is None else ram
        vram = target.vram_bytes if vram is None else vram
    chosen = search(
        unit_costs(found.units, machine, found.shape, found.counts, purpose.named),
        found.shape,
        machine,
        disk,
        ram_bytes=available_bytes() if ram is None else int(ram),
        vram_bytes=int(vram or 0),
        workload=purpose,
        goal=goal,
        most_sequences=most_sequences,
    )
    return Planned(found, machine, disk, chosen)
