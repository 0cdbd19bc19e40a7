"""Memory for busy neurons: most tokens a byte first, over all matrices together."""

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import replace

from endor.planning.activity import GROUPS
from endor.planning.tiers import Placement, Tier
from endor.planning.unit_cost import UnitCost
from endor.storage.layout import ALIGN


def keeping(
    filled: Placement, costs: Sequence[UnitCost], wishes: Mapping[str, Tier], ram_bytes: int
) -> Placement | None:
    """Return a placement in which memory of matrices stored by neuron goes to busy neurons.

    What such matrices have, and what is left over, is given to groups of neurons, the busiest
    first; a matrix all of whose neurons get some is `resident`, the others lie on disk. None where
    there is nothing to gain.

    Args:
        filled: A placement for the processor.
        costs: All units.
        wishes: Tiers that are fixed.
        ram_bytes: Memory for units and staging.
    """
    able = {
        cost.name: cost
        for cost in costs
        if cost.activity is not None
        and cost.name not in wishes
        and filled.tiers[cost.name] in ("resident", "disk")
        and cost.packed_bytes <= filled.staging_bytes
    }
    if all(filled.tiers[name] == "resident" for name in able):
        return None
    taken = {"dense": "dense_bytes", "resident": "packed_bytes"}
    room = ram_bytes - filled.staging_bytes
    for cost in costs:
        tier = filled.tiers[cost.name]
        if cost.name not in able and tier in taken:
            room -= getattr(cost, taken[tier])
    kept: dict[str, float] = dict.fromkeys(able, 0.0)
    queue = [_next(cost, 0) for cost in able.values()]
    heapq.heapify(queue)
    while queue:
        worth, name, group, share = heapq.heappop(queue)
        nbytes = (share - kept[name]) * able[name].packed_bytes
        if not worth or nbytes > room:
            continue  # a smaller matrix may still fit
        room -= int(nbytes) + 1
        kept[name] = share
        if group + 1 < GROUPS:
            heapq.heappush(queue, _next(able[name], group + 1))
    tiers = dict(filled.tiers)
    for name, share in kept.items():
        tiers[name] = "resident" if share >= 1.0 else "disk"
    blocks = {
        name: int(share * able[name].packed_bytes) // ALIGN * ALIGN
        for name, share in kept.items()
        if 0.0 < share < 1.0
    }
    return replace(filled, tiers=tiers, kept_bytes=blocks)


def _next(cost: UnitCost, group: int) -> tuple[float, str, int, float]:
    """Return how little a byte of the next group of neurons is worth, and what it comes to."""
    activity = cost.activity
    assert activity is not None
    before, share = (activity.blocks(each / GROUPS) for each in (group, group + 1))
    worth = activity.shares[group] * activity.neurons / GROUPS
    nbytes = max(1.0, (share - before) * cost.packed_bytes)
    return -worth / nbytes, cost.name, group, 1.0 if group + 1 == GROUPS else share
