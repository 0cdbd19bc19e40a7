"""When experts in VRAM change places with those in host memory, and whether they can.

An exchange is a copy over the link: it pays where the uses that it speeds up save more:

    (uses of who comes - uses of who goes) * (time outside VRAM - time in VRAM) > copy

with the uses of the window in which present ones fade (`endor.offload.hot_experts`). Nothing is
known of a model's routing before it runs, so a step is predicted with experts where they begin.
"""

from collections.abc import Sequence
from dataclasses import replace

from endor.planning.machine import Machine
from endor.planning.products import packed_s
from endor.planning.tiers import PACKED_IN_RAM, Exchanges, Placement
from endor.planning.unit_cost import UnitCost

STEP_SHARE = 0.25
"""Of the bytes that the link can copy in a step, what exchanges may take."""


def with_exchanges(
    filled: Placement,
    costs: Sequence[UnitCost],
    machine: Machine,
    *,
    step_s: float,
    rows: int,
    room: int,
) -> Placement:
    """Return a placement whose experts in VRAM may change, where host memory holds all of them.

    Args:
        filled: Where units begin.
        costs: All units.
        machine: Its constants, with a link.
        step_s: The predicted step.
        rows: Rows of it.
        room: Host memory that is left.
    """
    pool = replace(filled, exchanges=Exchanges(0.0, 0)).pool(costs)
    outside = [cost for cost in pool if filled.tiers[cost.name] in PACKED_IN_RAM]
    there = [cost for cost in pool if filled.tiers[cost.name] == "vram"]
    if not pool or sum(cost.packed_bytes for cost in there) > room:
        return filled
    link = machine.link
    assert link is not None
    gains = [_gain(cost, filled, machine, rows) for cost in outside]
    gain = sum(gains) / len(gains)
    if gain <= 0.0:
        return filled
    shares = [filled.host_shares[c.name] for c in outside if c.name in filled.host_shares]
    begin = dict.fromkeys((cost.name for cost in there), shares[0]) if shares else {}
    return replace(
        filled,
        host_shares={**filled.host_shares, **begin},
        exchanges=Exchanges(gain, int(STEP_SHARE * step_s * link.h2d_gbps * 1e9)),
    )


def _gain(cost: UnitCost, filled: Placement, machine: Machine, rows: int) -> float:
    """Return what a use saves in VRAM, in times of the copy; see `Exchanges`."""
    link = machine.link
    assert link is not None
    copy_s = cost.packed_bytes / link.h2d_gbps / 1e9 + link.copy_us / 1e6
    here_s = (cost.packed_bytes + 2 * cost.dense_bytes) / link.hbm_gbps / 1e9
    if filled.tiers[cost.name] != "host":
        return 1.0  # it is copied for its use, and multiplied like those that are there
    share = filled.host_shares.get(cost.name, 1.0)
    host_s = share * packed_s(cost, rows) + 2 * link.copy_us / 1e6
    return (max(host_s, (1.0 - share) * copy_s) - here_s) / copy_s
