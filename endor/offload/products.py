"""How a weight is multiplied where the bits need not be those of torch's own product."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from endor.offload.costs import UnitCost
    from endor.offload.hardware import Machine

PRODUCT_ROWS = 8
"""Input rows up to which a product from the packed form may be used."""

MOST_ROWS = 256
"""Rows of the probe of long products; what is not worth it there never is."""

NEVER = 1 << 62
"""More rows than any input has."""

PANEL = 1 << 20
"""Elements that are expanded, widened and multiplied at a time: they stay in the caches."""


@dataclass(frozen=True, slots=True)
class Products:
    """Which way is taken for how many input rows.

    Attributes:
        packed_rows: Rows up to which a unit's weights are multiplied from the packed form, at most
            `PRODUCT_ROWS`; what is missing has that many.
        wide_rows: Rows from which expanded weights are multiplied in float32, because this CPU only
            emulates their own type.
    """

    packed_rows: Mapping[str, int] = field(default_factory=dict)
    wide_rows: int = NEVER


def choose(costs: "Iterable[UnitCost]", machine: "Machine") -> Products:
    """Return the faster way for every unit and number of rows, by the constants of `machine`."""
    return Products({cost.name: packed_rows(cost, machine) for cost in costs}, wide_rows(machine))


def packed_rows(cost: "UnitCost", machine: "Machine") -> int:
    """Return the rows up to which a unit's product from the packed form beats expanding it."""
    for rows in range(1, PRODUCT_ROWS + 1):
        expanded = cost.expand_s + multiply_s(cost, machine, rows, wide=True)
        if packed_s(cost, rows) > expanded:
            return rows - 1
    return PRODUCT_ROWS


def packed_s(cost: "UnitCost", rows: int) -> float:
    """Return the seconds of a product from the packed form: unpacking is shared by the rows."""
    return cost.product_s * (1 + cost.row_cost * (rows - 1))


def multiply_s(cost: "UnitCost", machine: "Machine", rows: int, *, wide: bool) -> float:
    """Return the seconds of a product with an expanded unit; `wide` lets it be in float32."""
    narrow = max(cost.linear_s, 2 * rows * cost.weights / machine.gemm_gflops / 1e9)
    if not wide or rows < wide_rows(machine):
        return narrow
    return cost.weights * _wide_s(machine, rows)


def wide_rows(machine: "Machine") -> int:
    """Return the rows from which expanded weights are best multiplied in float32."""
    if machine.dtype == "F32" or not machine.float32_gflops:
        return NEVER
    for rows in range(1, MOST_ROWS + 1):
        narrow = max(2 / machine.linear_gbps, 2 * rows / machine.gemm_gflops) / 1e9
        if _wide_s(machine, rows) < narrow:
            return rows
    return NEVER


def _wide_s(machine: "Machine", rows: int) -> float:
    """Seconds per weight: reading it, widening it, reading it again, and its products."""
    moved = 2 / machine.read_gbps + 2 / machine.widen_gbps + 4 / machine.widen_gbps
    return (moved + 2 * rows / machine.float32_gflops) / 1e9
