"""Memory that is left over, for units whose entropy code is undone: more bytes, less work."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from endor.planning.fill import LEAST_UNITS
from endor.planning.tiers import Placement, Tier
from endor.planning.unit_cost import UnitCost

LESS = 0.9
"""A product must take less than this share of the time of the stored one: memory is not spent on
what two measurements differ by."""


def decoding(
    filled: Placement, costs: Sequence[UnitCost], wishes: Mapping[str, Tier], ram_bytes: int
) -> Placement | None:
    """Return a placement in which units packed in RAM are `decoded` as far as there is room.

    None where that gains nothing, or where anything lies on disk, which has more use for memory.

    Args:
        filled: A placement for the processor.
        costs: All units.
        wishes: Tiers that are fixed.
        ram_bytes: Memory for units and staging.
    """
    tiers = dict(filled.tiers)
    if "disk" in tiers.values():
        return None
    held = {"dense": "dense_bytes", "resident": "packed_bytes"}
    room = ram_bytes - sum(getattr(cost, held[tiers[cost.name]]) for cost in costs)
    # Each thread that reads has the largest packed, expanded and packed again.
    passing = (
        c.packed_bytes + c.dense_bytes + c.decoded.nbytes for c in costs if c.decoded is not None
    )
    room -= max(filled.staging_bytes, LEAST_UNITS * max(passing, default=0))
    for cost in costs:
        decoded = cost.decoded
        if decoded is None or tiers[cost.name] != "resident" or cost.name in wishes:
            continue
        more = decoded.nbytes - cost.packed_bytes
        if decoded.product_s < LESS * cost.product_s and more <= room:
            room -= more
            tiers[cost.name] = "decoded"
    return replace(filled, tiers=tiers) if tiers != filled.tiers else None
