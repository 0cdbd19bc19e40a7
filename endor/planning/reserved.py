"""What a plan gives memory to besides units, for a reader."""

from collections.abc import Mapping, Sequence

from endor.planning.tiers import Placement
from endor.planning.unit_cost import UnitCost
from endor.planning.workload import Reservation


def reserved(
    filled: Placement,
    costs: Sequence[UnitCost],
    fixed: Mapping[str, int],
    computes: str,
    exchange_bytes: int,
    host_kv: int,
) -> tuple[Reservation, ...]:
    """Return the memory that is spoken for, by purpose.

    Args:
        filled: Where the units are.
        costs: They.
        fixed: Memory that computing needs whatever the placement.
        computes: Where that is: `ram` or `vram`.
        exchange_bytes: Inputs and results of what the host multiplies beside a device.
        host_kv: Host memory that the cache takes beside a device.
    """
    out = [Reservation(what, computes, nbytes) for what, nbytes in fixed.items()]
    if filled.slots:
        outside = (cost.packed_bytes for cost in costs if filled.tiers[cost.name] != "vram")
        out.append(Reservation("device slots", "vram", filled.slots * max(outside, default=0)))
    begin = sum(cost.packed_bytes for cost in filled.moving(costs))
    more = {
        "activations between device and host": exchange_bytes,
        "cache of keys and values": host_kv,
        "staging and read-ahead": filled.staging_bytes,
        "experts that begin in VRAM": begin if filled.exchanges is not None else 0,
    }
    if filled.kept_bytes:
        nbytes = sum(filled.kept_bytes.values())
        out.append(Reservation("busy neurons", computes, nbytes))
    return (*out, *(Reservation(what, "ram", nbytes) for what, nbytes in more.items() if nbytes))
