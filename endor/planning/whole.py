"""Weights that several units make up."""

from collections.abc import Sequence
from dataclasses import replace

from endor.planning.tiers import Placement
from endor.planning.units import Unit, WeightSpec


def whole_weights(
    placement: Placement, units: Sequence[Unit], specs: Sequence[WeightSpec]
) -> Placement:
    """Return `placement` without units that are `dense` in vain.

    A weight stays expanded only when all its units do; with some of them elsewhere, the others are
    read for every use, and are to count as that.
    """
    unit_of = {tensor: unit.name for unit in units for tensor in unit.tensors}
    tiers = dict(placement.tiers)
    for spec in specs:
        inside = {unit_of[part.tensor] for part in spec.parts}
        if len({tiers[name] for name in inside}) > 1:
            tiers |= {name: "disk" for name in inside if tiers[name] == "dense"}
    return replace(placement, tiers=tiers)
