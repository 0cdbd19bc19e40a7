"""The search of a plan: over placements, ways to compute, places of the cache, and batch sizes.

`endor.planning.plan` finds the best placement for one batch and one place of the cache of keys and
values; here it is asked for each that can be had. For latency the batch is given, and the plan is
the one that `generate` runs by; for throughput it is searched for.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Literal, get_args

from endor.errors import BudgetError, ConfigError
from endor.planning.constants import Disk, Machine
from endor.planning.cost import kinds_of
from endor.planning.kv import SETTINGS, KVSetting
from endor.planning.outcome import Alternative, Plan
from endor.planning.plan import BEST, SHARES, plan_costs
from endor.planning.shape import ModelShape
from endor.planning.tiers import Tier
from endor.planning.unit_cost import UnitCost
from endor.planning.workload import Workload

Goal = Literal["latency", "throughput"]
"""What is to be best: the rate of a given batch, or that of all sequences of the best batch."""

MOST_SEQUENCES = 128
"""The largest batch that is tried where none is given."""

TRIES = 2
"""Shares of expanded units that are tried while batches and places are compared."""

FINALISTS = 3
"""Batches of the best rates so found that are planned with all shares: rough ones are 8 % off."""

WORTH = 1.01
"""A batch twice as large must be at least so much faster in all: each sequence gets slower."""


Planner = Callable[[int, KVSetting, int], Plan]
"""Plans for a batch and a place of the cache, with so many shares of expanded units tried."""


def check_goal(goal: object) -> Goal:
    """Return a goal that a caller gave.

    Raises:
        ConfigError: There is none of that name.
    """
    for known in get_args(Goal):
        if goal == known:
            return known  # type: ignore[no-any-return]
    raise ConfigError(f"goal must be one of {', '.join(get_args(Goal))}, got {goal!r:.40}")


def search(
    costs: Sequence[UnitCost],
    shape: ModelShape,
    machine: Machine,
    disk: Disk,
    *,
    ram_bytes: int,
    vram_bytes: int = 0,
    workload: Workload | None = None,
    wishes: Mapping[str, Tier] | None = None,
    goal: Goal = "latency",
    most_sequences: int = MOST_SEQUENCES,
) -> Plan:
    """Return the best plan found; `alternatives` has the best ways, this one first.

    Args:
        costs: All units, in execution order.
        shape: The rest of the model.
        machine: Its constants.
        disk: Where the packed files lie.
        ram_bytes: Host memory.
        vram_bytes: Device memory; 0 plans for the processor.
        workload: What it is for; its batch counts for latency, its `kv` is one place or `auto`.
        wishes: Tiers that are fixed beforehand.
        goal: What is to be best.
        most_sequences: The largest batch, for throughput.

    Raises:
        BudgetError: A budget cannot hold what must be in memory; the message has the least.
        ConfigError: The workload or the goal makes no sense.
    """
    workload = workload or Workload()
    kinds = kinds_of(costs)

    def planned(batch: int, kv: KVSetting, tries: int) -> Plan:
        return plan_costs(
            costs,
            shape,
            machine,
            disk,
            ram_bytes=ram_bytes,
            vram_bytes=vram_bytes,
            workload=replace(workload, batch=batch, kv=kv),
            wishes=wishes,
            kinds=kinds,
            tries=tries,
        )

    if check_goal(goal) == "latency":
        first = planned(workload.batch, workload.kv, SHARES)
        others = [
            each
            for kv in _places(workload.kv, on_device=vram_bytes > 0)
            if kv != first.workload.kv
            for each in _or_none(planned, workload.batch, kv)
        ]
    else:
        found = list(_batches(planned, workload, most_sequences, on_device=vram_bytes > 0))
        if not found:
            found = [planned(1, workload.kv, SHARES)]
        pairs = [
            (each, planned(each.workload.batch, each.workload.kv, SHARES))
            for each in _finalists(found)
        ]
        rough, first = pairs[0]
        for each, fine in pairs[1:]:
            if fine.decode_tokens_per_s > WORTH * first.decode_tokens_per_s:
                rough, first = each, fine
        others = [each for each in found if each is not rough]
    return replace(first, alternatives=tuple(_best(first, others)))


def _batches(planned: Planner, workload: Workload, most: int, *, on_device: bool) -> Iterator[Plan]:
    """Yield the plans of all batches and places that fit, the smaller batches first."""
    places = list(_places(workload.kv, on_device=on_device))
    batch = 1
    while places and batch <= most:
        fits = False
        for kv in list(places):
            if kv == "disk" and fits:
                continue  # reads for the cache only where memory is short
            made = list(_or_none(planned, batch, kv))
            if not made:
                places.remove(kv)  # a larger one would need more
            fits = fits or bool(made)
            yield from made
        batch *= 2


def _finalists(found: Iterable[Plan]) -> list[Plan]:
    """Return the best batches, each with its best place of the cache, the smaller batches first."""
    batches: dict[int, Plan] = {}
    for each in found:
        best = batches.setdefault(each.workload.batch, each)
        if each.decode_tokens_per_s > best.decode_tokens_per_s:
            batches[each.workload.batch] = each
    best_first = sorted(batches.values(), key=lambda each: -each.decode_tokens_per_s)
    return sorted(best_first[:FINALISTS], key=lambda each: each.workload.batch)


def _or_none(planned: Planner, batch: int, kv: KVSetting) -> Iterator[Plan]:
    try:
        yield planned(batch, kv, TRIES)
    except BudgetError:
        return


def _places(kv: KVSetting, *, on_device: bool) -> Iterable[KVSetting]:
    """Return where keys and values may be; without a device its memory is RAM."""
    if kv != "auto":
        return (kv,)
    return [each for each in SETTINGS if on_device or each != "ram"]


def _best(first: Plan, others: Iterable[Plan]) -> list[Alternative]:
    """Return the best ways, that of `first` before all.

    The fastest of each way to compute; then, where there are few ways, other places of the cache.
    """

    def way(each: Alternative) -> tuple[str, bool]:
        return each.way, each.expanded > 0 and not first.vram_bytes

    chosen, *rest = first.alternatives
    rest += [each for plan in others for each in plan.alternatives]
    rest.sort(key=lambda each: -each.decode_tokens_per_s)
    ways = {way(chosen): chosen}
    for each in rest:
        ways.setdefault(way(each), each)
    places = {(way(each), each.kv): each for each in ways.values()}
    for each in rest:
        places.setdefault((way(each), each.kv), each)
    return [chosen, *sorted(list(places.values())[1:BEST], key=lambda a: -a.decode_tokens_per_s)]
