"""Gives memory to units: who lives where, for one share of expanded units.

Wishes come first, then units much larger than the rest (staging and device slots have the size of
the largest unit that passes through them, so a language model's head would cost its size several
times), then everything else, evenly through the depth of the model.
"""

from collections.abc import Mapping, Sequence

from endor.errors import BudgetError
from endor.planning.tiers import SLOTS, STAGING_AHEAD_BYTES, Placement, Tier
from endor.planning.unit_cost import UnitCost

STAGING_UNITS = 4
"""Largest units that the staging area holds: one in use, one being read, two for uneven reads."""

LEAST_UNITS = 2
"""Largest units that host memory must hold: with one, reading and computing would take turns."""

OUTLIER = 2
"""A unit more than so many times the median size is placed before the others."""


def least_host_bytes(costs: Sequence[UnitCost], wishes: Mapping[str, Tier]) -> int:
    """Return the host memory without which nothing runs: what is wished there, and staging."""
    pinned = sum(cost.packed_bytes for cost in costs if wishes.get(cost.name) == "resident")
    return pinned + min(LEAST_UNITS * _largest(costs), sum(cost.packed_bytes for cost in costs))


def least_device_bytes(costs: Sequence[UnitCost], wishes: Mapping[str, Tier]) -> int:
    """Return the device memory without which nothing runs: what is wished there, and one slot."""
    pinned = sum(cost.packed_bytes for cost in costs if wishes.get(cost.name) == "vram")
    return pinned + _largest([cost for cost in costs if wishes.get(cost.name) != "vram"])


def share_host_bytes(ram_bytes: int, largest: Sequence[int], needs: Sequence[int]) -> list[int]:
    """Return the host memory of each of several devices: the least that works, then by need.

    Args:
        ram_bytes: For all of them.
        largest: Bytes of the largest unit of each.
        needs: Bytes that each cannot hold itself.

    Raises:
        BudgetError: It is too small for several devices; for one, `plan` says so.
    """
    if len(largest) == 1:
        return [ram_bytes]
    least = [LEAST_UNITS * nbytes for nbytes in largest]
    if ram_bytes < sum(least):
        raise BudgetError(
            f"plan: the ram budget must be at least {sum(least)} bytes for "
            f"units on their way to {len(least)} devices, got {ram_bytes}; raise ram"
        )
    rest = max(0, ram_bytes - sum(least))
    total = sum(needs)
    return [
        low + (rest * need // total if total else rest // len(least))
        for low, need in zip(least, needs, strict=True)
    ]


def fill_host(
    costs: Sequence[UnitCost],
    wishes: Mapping[str, Tier],
    ram_bytes: int,
    dense_share: float,
) -> Placement | None:
    """Return a placement for the processor, or None when so many expanded units do not fit.

    Args:
        costs: All units, in execution order.
        wishes: Tiers that are fixed: `resident` or `disk`.
        ram_bytes: Memory for units and staging.
        dense_share: Share of the units to keep expanded.
    """
    tiers = dict(wishes)
    staging = _fill_ram(costs, tiers, ram_bytes, dense_share, passing=[], passage=0)
    return None if staging is None else Placement(tiers, staging)


def fill_device(
    costs: Sequence[UnitCost],
    wishes: Mapping[str, Tier],
    vram_bytes: int,
    ram_bytes: int,
    dense_share: float,
) -> Placement | None:
    """Return a placement for a device; arguments as for `fill_host`, wishes may be `vram`.

    Units that are expanded in VRAM pass through staging and a slot once, like streamed ones.
    """
    tiers = dict(wishes)
    free = [cost for cost in costs if cost.name not in tiers]
    room = vram_bytes - sum(c.packed_bytes for c in costs if tiers.get(c.name) == "vram")
    outside = [cost for cost in costs if tiers.get(cost.name) in ("resident", "disk")]
    # Units bound for the device pass through two buffers in host memory when they are loaded.
    passage = min(LEAST_UNITS * _largest(costs), sum(cost.packed_bytes for cost in costs))
    if not dense_share and not outside and sum(cost.packed_bytes for cost in free) <= room:
        tiers |= dict.fromkeys((cost.name for cost in free), "vram")
        return Placement(tiers, 0)
    free, room = _outliers_first(costs, free, tiers, "vram", room)
    slot = _largest([*free, *outside])
    slots = min(SLOTS, room // slot) if slot else 0
    if slot and slots < 1:
        return None
    room -= slots * slot
    free, room = fill(free, tiers, "vram-dense", room, dense_share)
    expanded = [cost for cost in costs if tiers.get(cost.name) == "vram-dense"]
    if dense_share and not expanded:
        return None
    fill(free, tiers, "vram", room, 1.0)
    host = [cost for cost in costs if tiers.get(cost.name) in (None, "resident", "disk")]
    staging = _fill_ram(host, tiers, ram_bytes, 0.0, passing=expanded, passage=passage)
    return None if staging is None else Placement(tiers, staging, slots)


def fill(
    free: Sequence[UnitCost],
    tiers: dict[str, Tier],
    tier: Tier,
    room: int,
    share: float,
) -> tuple[list[UnitCost], int]:
    """Give `tier` to a share of the `free` units, evenly through depth; return (rest, room).

    Units that every step needs come before those of which it needs a part (matrices stored by
    neuron), and these before experts. Within each kind, a unit is chosen when
    the chosen bytes fall behind their share of the bytes seen; what still fits is added last.
    """
    chosen: set[str] = set()
    always = [cost for cost in free if cost.scheduled]
    groups = [
        [cost for cost in always if not cost.by_neuron],
        # expanded, nothing of them could be skipped
        [cost for cost in always if cost.by_neuron and tier != "dense"],
        [cost for cost in free if not cost.scheduled],
    ]
    for group in groups:
        sizes = [_bytes_in(cost, tier) for cost in group]
        total = sum(sizes)
        if not total or room <= 0:
            continue
        wanted = min(share, room / total)
        seen = taken = 0
        later = []
        for cost, nbytes in zip(group, sizes, strict=True):
            seen += nbytes
            if nbytes <= room and taken + nbytes <= wanted * seen + nbytes / 2:
                taken += nbytes
                room -= nbytes
                chosen.add(cost.name)
            else:
                later.append((cost, nbytes))
        if share == 1.0:
            for cost, nbytes in later:
                if nbytes <= room:
                    room -= nbytes
                    chosen.add(cost.name)
    tiers |= dict.fromkeys(chosen, tier)
    return [cost for cost in free if cost.name not in chosen], room


def _fill_ram(
    costs: Sequence[UnitCost],
    tiers: dict[str, Tier],
    ram_bytes: int,
    dense_share: float,
    *,
    passing: Sequence[UnitCost],
    passage: int,
) -> int | None:
    """Place what has no tier yet in RAM or on disk; return the staging bytes, None if impossible.

    Args:
        costs: The units that host memory has to do with.
        tiers: What has one; completed.
        ram_bytes: The budget.
        dense_share: Share of the units to keep expanded.
        passing: Units elsewhere that pass through staging.
        passage: Bytes that must be free while the model is loaded.
    """
    free = [cost for cost in costs if cost.name not in tiers]
    streamed = [*passing, *(cost for cost in costs if tiers.get(cost.name) == "disk")]
    room = ram_bytes - sum(c.packed_bytes for c in costs if tiers.get(c.name) == "resident")
    staging = staging_bytes(streamed, room)
    if not dense_share:
        everything = sum(cost.packed_bytes for cost in free)
        if everything + max(staging, passage) <= room:
            tiers |= dict.fromkeys((cost.name for cost in free), "resident")
            return staging
        free, room = _outliers_first(costs, free, tiers, "resident", room)
    staging = staging_bytes([*streamed, *free], room)
    room -= max(staging, passage)
    if dense_share:
        before = len(free)
        free, room = fill(free, tiers, "dense", room, dense_share)
        if len(free) == before:
            return None
    free, _ = fill(free, tiers, "resident", room, 1.0)
    tiers |= dict.fromkeys((cost.name for cost in free), "disk")
    return staging


def _outliers_first(
    costs: Sequence[UnitCost],
    free: Sequence[UnitCost],
    tiers: dict[str, Tier],
    tier: Tier,
    room: int,
) -> tuple[list[UnitCost], int]:
    """Give `tier` to units that are much larger than the others; return (rest, room)."""
    sizes = sorted(cost.packed_bytes for cost in costs)
    left = sorted(free, key=lambda cost: -cost.packed_bytes)
    while left and left[0].scheduled and left[0].packed_bytes > OUTLIER * sizes[len(sizes) // 2]:
        after = LEAST_UNITS * _largest(left[1:])
        if left[0].packed_bytes + after > room:
            break
        room -= left[0].packed_bytes
        tiers[left.pop(0).name] = tier
    return [cost for cost in free if cost.name not in tiers], room


def staging_bytes(passing: Sequence[UnitCost], room: int) -> int:
    """Room for a few of the largest units, before any is resident.

    Less makes reading and computing take turns; more would only keep fewer units resident.
    """
    largest = _largest(passing)
    everything = sum(cost.packed_bytes for cost in passing)
    ahead = min((STAGING_UNITS - 1) * largest, STAGING_AHEAD_BYTES, everything - largest)
    return max(largest, min(largest + ahead, room))


def _bytes_in(cost: UnitCost, tier: Tier) -> int:
    return cost.dense_bytes if tier in ("dense", "vram-dense") else cost.packed_bytes


def _largest(costs: Sequence[UnitCost]) -> int:
    return max((cost.packed_bytes for cost in costs), default=0)
