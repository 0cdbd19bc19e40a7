"""Memory for busy neurons: most seconds a byte first, over all matrices together.

A byte of a unit that every step reads saves the time of one byte. A byte of a busy neuron is needed
less often, and saves its share of a request besides, which costs as much as many bytes.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from endor.planning.activity import GROUPS
from endor.planning.constants import Disk
from endor.planning.fill import fill_host, least_host_bytes, staging_bytes
from endor.planning.tiers import Placement, Tier
from endor.planning.unit_cost import UnitCost
from endor.storage.layout import ALIGN


@dataclass(frozen=True, slots=True)
class Portion:
    """Blocks of one matrix: those of its busiest neurons, behind what was kept before.

    Attributes:
        worth: Seconds that a byte of them saves a step.
        name: The matrix.
        start: Bytes of busier blocks.
        stop: Bytes with these.
    """

    worth: float
    name: str
    start: int
    stop: int


def keeping(
    costs: Sequence[UnitCost],
    wishes: Mapping[str, Tier],
    ram_bytes: int,
    dense_share: float,
    disk: Disk,
    rows: int,
) -> Placement | None:
    """Return a placement for the processor that keeps what busy neurons need.

    What saves more than other units would gets memory before them; what is left over goes to
    the rest. A matrix of which all is kept is `resident`, others that were counted lie on disk.

    Args:
        costs: All units, in execution order.
        wishes: Tiers that are fixed.
        ram_bytes: Memory for units and staging.
        dense_share: Share of the units to keep expanded.
        disk: Where the others lie.
        rows: Rows of input of a step.

    Returns:
        None where no such matrix was counted, all fits, or nothing is worth keeping.
    """
    able = [cost for cost in costs if cost.activity is not None and cost.name not in wishes]
    if not able or sum(cost.packed_bytes for cost in costs) <= ram_bytes:
        return None
    portions = sorted(
        (each for cost in able for each in portions_of(cost, disk, rows)),
        key=lambda each: (-each.worth, each.name, each.start),
    )
    busy = [each for each in portions if each.worth * disk.read_gbps * 1e9 > 1.0]
    rest = portions[len(busy) :]
    free = [cost for cost in costs if cost.name not in wishes]
    aside = max(staging_bytes(free, ram_bytes), least_host_bytes(costs, wishes))
    kept: dict[str, int] = {cost.name: 0 for cost in able}
    _take(kept, busy, ram_bytes - aside)
    sizes = {cost.name: cost.packed_bytes for cost in able}

    def placed() -> dict[str, Tier]:
        return {
            name: "resident" if nbytes == sizes[name] else "disk" for name, nbytes in kept.items()
        }

    partly = sum(nbytes for name, nbytes in kept.items() if nbytes < sizes[name])
    filled = fill_host(costs, {**wishes, **placed()}, ram_bytes - partly, dense_share)
    if filled is None:
        return None
    tiers = filled.tiers
    room = ram_bytes - partly - filled.staging_bytes
    room -= sum(cost.packed_bytes for cost in costs if tiers[cost.name] == "resident")
    room -= sum(cost.dense_bytes for cost in costs if tiers[cost.name] == "dense")
    _take(kept, rest, room)
    blocks = {
        name: nbytes // ALIGN * ALIGN
        for name, nbytes in kept.items()
        if ALIGN <= nbytes < sizes[name]
    }
    if not blocks:
        return None
    return replace(filled, tiers={**tiers, **placed()}, kept_bytes=blocks)


def portions_of(cost: UnitCost, disk: Disk, rows: int) -> Iterator[Portion]:
    """Yield the portions of a matrix, each worth less than the one before.

    Groups of neurons are joined until that is so: the first ones save nothing where so many others
    are left that the whole is read.
    """
    activity, packed = cost.activity, cost.packed_bytes
    assert activity is not None
    hull: list[tuple[int, float]] = []
    for group in range(GROUPS + 1):
        nbytes = packed if group == GROUPS else int(activity.blocks(group / GROUPS) * packed)
        point = nbytes, activity.reads(packed, disk, rows, nbytes / packed)[1]
        while len(hull) > 1 and _worth(hull[-2], hull[-1]) <= _worth(hull[-1], point):
            hull.pop()
        hull.append(point)
    for one, other in itertools.pairwise(hull):
        if other[0] > one[0] and other[1] < one[1]:
            yield Portion(_worth(one, other), cost.name, one[0], other[0])


def _worth(one: tuple[int, float], other: tuple[int, float]) -> float:
    """Return the seconds that each byte from one point to another saves."""
    return (one[1] - other[1]) / max(1, other[0] - one[0])


def _take(kept: dict[str, int], portions: Sequence[Portion], room: int) -> None:
    """Keep portions, as far as there is room; of the first that does not fit, a part."""
    for each in portions:
        if kept[each.name] != each.start:
            continue  # what comes before did not fit
        taken = min(each.stop - each.start, room)
        if taken <= 0:
            return
        kept[each.name] += taken
        room -= taken
