"""Device memory for busy neurons, whose matrices the host multiplies: most tokens a byte first.

A matrix stored by neuron that is in RAM is multiplied there by what is active. What its busiest
neurons have is better on the device, where bytes are read an order of magnitude faster; and no byte
of it crosses the link.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

from endor.planning.activity import GROUPS
from endor.planning.beside import Way
from endor.planning.tiers import PACKED_IN_RAM, Placement, Tier
from endor.planning.unit_cost import UnitCost
from endor.storage.layout import ALIGN


def with_busy_neurons(
    ways: Iterable[tuple[Way, Placement]],
    costs: Sequence[UnitCost],
    wishes: Mapping[str, Tier],
    vram_bytes: int,
    ram_bytes: int,
) -> Iterator[tuple[Way, Placement]]:
    """Yield ways to use a placement, and each with busy neurons on the device where there are such.

    Arguments as for `busy_on_device`.
    """
    for way, filled in ways:
        yield way, filled
        kept = busy_on_device(filled, costs, wishes, vram_bytes, ram_bytes)
        if kept is not None:
            yield "host" if way == "stream" else way, kept


def busy_on_device(
    filled: Placement,
    costs: Sequence[UnitCost],
    wishes: Mapping[str, Tier],
    vram_bytes: int,
    ram_bytes: int,
) -> Placement | None:
    """Return a placement in which matrices stored by neuron are shared out by neuron.

    Those in VRAM come to RAM, as far as there is room, and leave their memory to busy neurons of
    all. None where no such matrix was counted, or there is no memory for it.

    Args:
        filled: A placement on a device, for a step that the host may take part in.
        costs: All units.
        wishes: Tiers that are fixed.
        vram_bytes: Device memory for units and slots.
        ram_bytes: Host memory for units and staging.
    """
    tiers = dict(filled.tiers)
    outside = [cost.packed_bytes for cost in costs if tiers[cost.name] != "vram"]
    if not filled.slots or not outside:
        return None
    room = ram_bytes - filled.staging_bytes
    room -= sum(cost.packed_bytes for cost in costs if tiers[cost.name] in PACKED_IN_RAM)
    able = []
    for cost in costs:
        if cost.activity is None or cost.name in wishes or not cost.multiplies:
            continue
        if tiers[cost.name] == "vram" and cost.packed_bytes <= min(room, max(outside)):
            room -= cost.packed_bytes
            tiers[cost.name] = "host"
        if tiers[cost.name] in PACKED_IN_RAM:
            tiers[cost.name] = "host"
            able.append(cost)
    free = vram_bytes - filled.slots * max(outside)
    taken = {"vram": "packed_bytes", "vram-dense": "dense_bytes"}
    free -= sum(getattr(c, taken[tiers[c.name]]) for c in costs if tiers[c.name] in taken)
    groups = sorted(
        (
            (-share * cost.activity.neurons / cost.packed_bytes, cost.name, group, cost)
            for cost in able
            if cost.activity is not None
            for group, share in enumerate(cost.activity.shares)
            if share
        ),
        key=lambda each: each[:3],
    )
    kept: dict[str, int] = {}
    for _, name, _, cost in groups:
        nbytes = cost.packed_bytes // GROUPS // ALIGN * ALIGN
        if 0 < nbytes <= free:
            kept[name] = kept.get(name, 0) + nbytes
            free -= nbytes
    if not kept:
        return None
    shares = {name: share for name, share in filled.host_shares.items() if name not in kept}
    return replace(filled, tiers=tiers, host_shares=shares, kept_bytes=kept)
