"""Moves weights: they stay packed in RAM or VRAM, or come from disk just before they are used."""

from endor.offload.engine import Engine
from endor.offload.ledger import Event, Ledger
from endor.offload.memory import Range, Scratch, Staging
from endor.offload.room import Room
from endor.offload.schedule import Schedule
from endor.offload.state import Phase, State
from endor.offload.store import Store, Weight

__all__ = [
    "Engine",
    "Event",
    "Ledger",
    "Phase",
    "Range",
    "Room",
    "Schedule",
    "Scratch",
    "Staging",
    "State",
    "Store",
    "Weight",
]
