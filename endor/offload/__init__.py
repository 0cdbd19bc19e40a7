"""Weights that stay packed in RAM, or are streamed from disk just before they are used."""

from endor.offload.engine import Engine
from endor.offload.ledger import Event, Ledger
from endor.offload.limits import available_bytes
from endor.offload.memory import Range, Scratch, Staging
from endor.offload.placement import Placement, Tier, parse_bytes
from endor.offload.room import Room
from endor.offload.schedule import Schedule
from endor.offload.state import Phase, State
from endor.offload.store import Store, Weight
from endor.offload.units import Part, Unit, WeightSpec, collect_units

__all__ = [
    "Engine",
    "Event",
    "Ledger",
    "Part",
    "Phase",
    "Placement",
    "Range",
    "Room",
    "Schedule",
    "Scratch",
    "Staging",
    "State",
    "Store",
    "Tier",
    "Unit",
    "Weight",
    "WeightSpec",
    "available_bytes",
    "collect_units",
    "parse_bytes",
]
