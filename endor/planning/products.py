"""How a weight is multiplied where the bits need not be those of torch's own product."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from endor.planning.constants import Machine
from endor.planning.device_rates import MOST_ROWS as MOST_ROWS_ON_DEVICE
from endor.planning.device_rates import product_s
from endor.planning.unit_cost import UnitCost

PRODUCT_ROWS = 8
"""Input rows up to which a product from the packed form may be used."""

MOST_ROWS = 256
"""Rows of the probe of long products; what is not worth it there never is."""

NEVER = 1 << 62
"""More rows than any input has."""

PANEL = 1 << 20
"""Elements that are expanded, widened and multiplied at a time: they stay in the caches."""


ITEMSIZE = {"BF16": 2, "F16": 2, "F32": 4}
"""Bytes of a weight, by the type that constants are of; other types are expanded to 16 bits."""


@dataclass(frozen=True, slots=True)
class Products:
    """Which way is taken for how many input rows.

    Attributes:
        packed_rows: Rows up to which a unit's weights are multiplied from the packed form, at most
            `PRODUCT_ROWS`; what is missing has that many.
        wide_rows: Rows from which expanded weights are multiplied in float32, because this CPU only
            emulates their own type.
        head_rows: Rows up to which an output head that is not packed is multiplied by Endor's own
            product, at most `PRODUCT_ROWS`.
    """

    packed_rows: Mapping[str, int] = field(default_factory=dict)
    wide_rows: int = NEVER
    head_rows: int = 0


def choose(costs: Iterable[UnitCost], machine: Machine) -> Products:
    """Return the faster way for every unit and number of rows, by the constants of `machine`."""
    packed = {cost.name: packed_rows(cost, machine) for cost in costs}
    return Products(packed, wide_rows(machine), head_rows(machine))


def packed_rows(cost: UnitCost, machine: Machine) -> int:
    """Return the rows up to which a unit's product from the packed form beats expanding it."""
    for rows in range(1, PRODUCT_ROWS + 1):
        expanded = cost.expand_s + multiply_s(cost, machine, rows, wide=True)
        if packed_s(cost, rows) > expanded:
            return rows - 1
    return PRODUCT_ROWS


def packed_s(cost: UnitCost, rows: int) -> float:
    """Return the seconds of a product from the packed form: unpacking is shared by the rows."""
    return cost.product_s * (1 + cost.row_cost * (rows - 1))


def device_s(cost: UnitCost, rows: int) -> float:
    """Return the seconds of a device's product from the packed form; infinite if it has none."""
    if cost.device_rates is None or rows > MOST_ROWS_ON_DEVICE:
        return math.inf
    return product_s(cost.weights, cost.device_rates, rows)


def multiply_s(cost: UnitCost, machine: Machine, rows: int, *, wide: bool) -> float:
    """Return the seconds of a product with an expanded unit; `wide` lets it be in float32."""
    narrow = max(cost.linear_s, 2 * rows * cost.weights / machine.gemm_gflops / 1e9)
    if not wide or rows < wide_rows(machine):
        return narrow
    return cost.weights * _wide_s(machine, rows)


def head_rows(machine: Machine) -> int:
    """Return the rows up to which Endor's own product with a dense matrix beats torch's."""
    rows = 0
    while rows < PRODUCT_ROWS and plain_s(machine, rows + 1) < _narrow_s(machine, rows + 1):
        rows += 1
    return rows


def head_s(machine: Machine, weights: float, rows: int, *, own: bool) -> float:
    """Return the seconds of a product with a dense matrix; `own` lets it be Endor's."""
    if own and rows <= head_rows(machine):
        return weights * plain_s(machine, rows)
    return weights * _narrow_s(machine, rows)


def plain_s(machine: Machine, rows: int) -> float:
    """Return the seconds per weight of Endor's own product with a dense matrix."""
    if not machine.plain_gbps:
        return math.inf
    itemsize = ITEMSIZE.get(machine.dtype, 2)
    return itemsize / machine.plain_gbps / 1e9 * (1 + machine.plain_row_cost * (rows - 1))


def _narrow_s(machine: Machine, rows: int) -> float:
    """Seconds per weight of torch's product."""
    moved = ITEMSIZE.get(machine.dtype, 2) / machine.linear_gbps
    return max(moved, 2 * rows / machine.gemm_gflops) / 1e9


def wide_rows(machine: Machine) -> int:
    """Return the rows from which expanded weights are best multiplied in float32."""
    if machine.dtype == "F32" or not machine.float32_gflops:
        return NEVER
    for rows in range(1, MOST_ROWS + 1):
        if _wide_s(machine, rows) < _narrow_s(machine, rows):
            return rows
    return NEVER


def _wide_s(machine: Machine, rows: int) -> float:
    """Seconds per weight: reading it, widening it, reading it again, and its products."""
    moved = 2 / machine.read_gbps + 2 / machine.widen_gbps + 4 / machine.widen_gbps
    return (moved + 2 * rows / machine.float32_gflops) / 1e9
