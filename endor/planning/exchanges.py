"""When experts in VRAM change places with those in host memory, and whether they can.

An exchange is a copy over the link: it pays where the uses that it speeds up save more:

    (uses of who comes - uses of who goes) * (time outside VRAM - time in VRAM) > copy

with the uses of the window in which present ones fade (`endor.offload.hot_experts`). Nothing is
known of a model's routing before it runs, so a step is predicted with experts where they begin.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

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


@dataclass(frozen=True, slots=True)
class Times:
    """Seconds of one use of an expert.

    Attributes:
        here: In VRAM: expanded and multiplied there.
        host: Multiplied where it lies in host memory, and the way there and back.
        copy: Its copy over the link.
    """

    here: float
    host: float
    copy: float

    @classmethod
    def of(cls, cost: UnitCost, machine: Machine, rows: int) -> Self:
        """Return those of an expert on a machine with a link."""
        link = machine.link
        assert link is not None
        return cls(
            here=(cost.packed_bytes + 2 * cost.dense_bytes) / link.hbm_gbps / 1e9,
            host=packed_s(cost, rows) + 2 * link.copy_us / 1e6,
            copy=cost.packed_bytes / link.h2d_gbps / 1e9 + link.copy_us / 1e6,
        )

    def gain(self, share: float) -> float:
        """Return what a use saves in VRAM, in times of the copy, see `Exchanges`.

        Args:
            share: Of the rows that the host multiplies outside VRAM while the others are copied.
        """
        if not share:
            return 1.0  # it is copied for its use, and multiplied like those that are there
        return (max(share * self.host, (1.0 - share) * self.copy) - self.here) / self.copy


def _gain(cost: UnitCost, filled: Placement, machine: Machine, rows: int) -> float:
    hosted = filled.tiers[cost.name] == "host"
    share = filled.host_shares.get(cost.name, 1.0) if hosted else 0.0
    return Times.of(cost, machine, rows).gain(share)
