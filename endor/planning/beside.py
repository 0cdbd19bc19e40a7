"""What the host multiplies beside a device: which units, or which share of each one's rows.

A unit in RAM has two roads to a product: over the link, or through the host's own product. Both are
open at once, so the shares are chosen that both ends take equally long:

    stream   everything crosses the link
    host     some whole units are multiplied where they lie, spread through the depth of the model
    both     the host multiplies some rows of every unit, while the others cross the link
    experts  the host multiplies all experts that are in RAM, and what every token needs crosses
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Literal, get_args

from endor.errors import ConfigError
from endor.planning.constants import Machine
from endor.planning.cost import Prediction
from endor.planning.products import PRODUCT_ROWS, Products, packed_s
from endor.planning.tiers import Placement, Tier
from endor.planning.unit_cost import UnitCost

HostCompute = Literal["auto", "on", "off"]
"""Whether the host multiplies beside a device: where that is faster, always, or never."""

Way = Literal["stream", "host", "both", "experts"]


def check_host_compute(wish: object, *, exact: bool) -> None:
    """Raise `ConfigError` unless a wish can be had with products that are `exact` or not."""
    if wish not in get_args(HostCompute):
        raise ConfigError(f"host_compute must be auto, on or off, got {wish!r:.40}")
    if wish == "on" and exact:
        raise ConfigError(
            "host_compute='on' sums in another order than the unpacked model: pass exact=False "
            "(--fast) too, or leave it at 'auto'"
        )


def balanced(
    placed: Callable[[float], Placement], predicted: Callable[[Placement], Prediction]
) -> float:
    """Return the share for the host with which the link and the device end together.

    Args:
        placed: The placement with a share; times are about linear in it.
        predicted: Predicts the step that is to be fast.
    """

    def ahead(share: float) -> float:
        resources = predicted(placed(share)).resources
        return resources["link"] - resources["gpu"]

    first, second = ahead(0.25), ahead(0.75)
    if first <= second:
        return 1.0 if first > 0 else 0.0
    return min(1.0, max(0.0, 0.25 + 0.5 * first / (first - second)))


def placements(
    filled: Placement,
    costs: Sequence[UnitCost],
    wish: HostCompute,
    predicted: Callable[[Placement], Prediction],
) -> Iterator[tuple[Way, Placement]]:
    """Yield the ways to use a placement, the simplest first; `filled` itself is to stream.

    Args:
        filled: A placement on a device without tier `host`.
        costs: All units, in execution order.
        wish: What the caller wants.
        predicted: Predicts the step that is to be fast.
    """
    able = [c for c in costs if c.multiplies and filled.tiers[c.name] == "resident"]
    if wish != "on" or not able:
        yield "stream", filled
    if wish == "off" or not able:
        return
    names = [cost.name for cost in able]

    def units(share: float) -> Placement:
        return hosting(filled, spread(able, share))

    def rows(share: float) -> Placement:
        return replace(hosting(filled, names), host_shares=dict.fromkeys(names, share))

    whole = units(balanced(units, predicted))
    if "host" in whole.tiers.values():
        yield "host", whole
    elif wish == "on":
        yield "host", hosting(filled, names)
    share = balanced(rows, predicted)
    if 0.0 < share < 1.0:
        yield "both", rows(share)
    experts = [cost.name for cost in able if not cost.scheduled]
    if 0 < len(experts) < len(able):
        yield "experts", hosting(filled, experts)


def hosting(filled: Placement, names: Sequence[str]) -> Placement:
    """Return a placement with the units `names` multiplied on the host."""
    chosen: dict[str, Tier] = dict.fromkeys(names, "host")
    return replace(filled, tiers={**filled.tiers, **chosen})


def spread(costs: Sequence[UnitCost], share: float) -> list[str]:
    """Return the names of units with about `share` of the bytes, evenly through `costs`."""
    chosen, seen, taken = [], 0.0, 0.0
    for cost in costs:
        nbytes = cost.use * cost.packed_bytes
        seen += nbytes
        if taken + nbytes / 2 <= share * seen:
            taken += nbytes
            chosen.append(cost.name)
    return chosen


def host_products(
    placement: Placement, costs: Sequence[UnitCost], machine: Machine, rows: int
) -> Products:
    """Return up to how many input rows the units in tier `host` are multiplied there.

    As long as the host is not slower than the link would be with the whole unit, and at least for
    the `rows` that were planned for.
    """
    link = machine.link
    assert link is not None
    limits: Mapping[str, int] = {
        cost.name: max(
            rows if rows <= PRODUCT_ROWS else 0,
            _rows(cost, placement.host_shares.get(cost.name, 1.0), link.h2d_gbps),
        )
        for cost in costs
        if placement.tiers[cost.name] == "host"
    }
    return Products(packed_rows=limits)


def _rows(cost: UnitCost, share: float, h2d_gbps: float) -> int:
    streamed = cost.packed_bytes / h2d_gbps / 1e9
    fitting = [n for n in range(1, PRODUCT_ROWS + 1) if share * packed_s(cost, n) <= streamed]
    return max(fitting, default=0)
