"""Measures this machine and decides where weights live; moves nothing."""

from endor.planning.limits import available_bytes
from endor.planning.tiers import Placement, Tier, parse_bytes
from endor.planning.units import Part, Unit, WeightSpec, collect_units

__all__ = [
    "Part",
    "Placement",
    "Tier",
    "Unit",
    "WeightSpec",
    "available_bytes",
    "collect_units",
    "parse_bytes",
]
