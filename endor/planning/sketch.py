"""What packing would make of a model, before it is packed: sizes by method, cost by matrix."""

from collections.abc import Sequence
from dataclasses import dataclass

from endor.errors import ConfigError
from endor.planning.constants import Machine
from endor.planning.device_rates import modelled
from endor.planning.unit_cost import PRODUCT_ROW_COST, UnitCost

LOSSLESS_BITS = 11.0
"""Bits of a bf16 weight whose exponents are coded: DFloat11 (arXiv 2504.11651) finds 70 % of the
bytes on published models; SmolLM2, whose weights lie on a grid, takes 11.49 here."""
SURVIVOR_BITS = 10.05
"""Bits of what pruning leaves: 50 % of SmolLM2 take 6.06 bits a weight with the bitmap."""
BITMAP_BITS = 1.03


@dataclass(frozen=True, slots=True)
class Matrix:
    """A matrix that would be packed.

    Attributes:
        name: Its parameter, with the expert's number where there are several.
        numel: Elements.
        routed: Whether only some tokens need it.
    """

    name: str
    numel: int
    routed: bool = False


@dataclass(frozen=True, slots=True)
class Method:
    """How a model would be packed.

    Attributes:
        label: What to call it.
        bits: Bits a weight, with all metadata.
        kind: Kind of stored tensor, for its rates.
    """

    label: str
    bits: float
    kind: str


def method(*, sparsity: float | None = None, bits: float | None = None) -> Method:
    """Return what `endor pack` would do: lossless, pruned, or quantised.

    Args:
        sparsity: Share of zeros that pruning makes.
        bits: Bits a weight.

    Raises:
        ConfigError: Both, or one out of its range.
    """
    if sparsity is not None and bits is not None:
        raise ConfigError("plan: a sketch is of a sparsity or of bits a weight, got both")
    if bits is not None:
        if not 1.5 <= bits <= 8:
            raise ConfigError(f"bits must be 1.5 to 8, got {bits}")
        return Method(f"{bits:g} bits", bits, "int")
    if sparsity is None:
        return Method("lossless", LOSSLESS_BITS, "exp")
    if not 0 < sparsity < 1:
        raise ConfigError(f"sparsity must lie between 0 and 1, got {sparsity}")
    bits = (1 - sparsity) * SURVIVOR_BITS + BITMAP_BITS
    return Method(f"{sparsity:.0%} pruned", bits, "exp+bitmap")


def sketch_costs(
    matrices: Sequence[Matrix],
    how: Method,
    machine: Machine,
    *,
    expert_use: float,
    itemsize: int = 2,
) -> tuple[UnitCost, ...]:
    """Return the cost of each matrix as a unit of its own.

    Args:
        matrices: What would be packed, in the order of use.
        how: How.
        machine: Where it would run.
        expert_use: Share of the experts that a token needs.
        itemsize: Bytes of an expanded weight.
    """
    out = []
    on_device = modelled(machine.link.name) if machine.link else {}
    for matrix in matrices:
        packed = int(matrix.numel * how.bits / 8)
        dense = matrix.numel * itemsize
        out.append(
            UnitCost(
                name=matrix.name,
                packed_bytes=packed,
                dense_bytes=dense,
                weights=matrix.numel,
                expand_s=dense / machine.expand_gbps[how.kind] / 1e9,
                linear_s=dense / machine.linear_gbps / 1e9,
                product_s=packed / machine.product_gbps[how.kind] / 1e9,
                use=expert_use if matrix.routed else 1.0,
                scheduled=not matrix.routed,
                device_rates=on_device.get(how.kind),
                row_cost=machine.product_row_cost.get(how.kind, PRODUCT_ROW_COST),
            )
        )
    return tuple(out)
