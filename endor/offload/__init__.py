"""Moves weights: they stay packed in RAM or VRAM, or come from disk just before they are used."""

from endor.offload.ledger import Event, Ledger
from endor.offload.store import Store
from endor.offload.weight import Weight

__all__ = ["Event", "Ledger", "Store", "Weight"]
