"""Where each unit lives when a CUDA device computes: in its memory, in locked RAM, on disk."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

from endor.errors import ConfigError
from endor.offload.placement import Placement, Tier
from endor.offload.units import Unit

HomeTier = Literal["vram-dense", "vram", "resident", "disk"]
"""`vram-dense`: expanded once and kept on the device; `vram`: packed on the device; `resident`:
packed in locked RAM; `disk`: read for every use."""

SLOTS = 3
"""Units in flight: two leave the link idle a fifth of the time."""


@dataclass(frozen=True, slots=True)
class DevicePlacement:
    """A tier for every unit.

    Attributes:
        tiers: Tier per unit name.
        staging_bytes: Host memory through which `disk` and `vram-dense` units pass.
        slots: Device slots through which everything passes that is not packed in VRAM; 0 when
            nothing does.
    """

    tiers: Mapping[str, HomeTier]
    staging_bytes: int
    slots: int = SLOTS

    def in_vram(self, units: Sequence[Unit]) -> list[Unit]:
        """Return the units whose packed form lives on the device."""
        return [unit for unit in units if self.tiers[unit.name] == "vram"]

    def outside(self, units: Sequence[Unit]) -> list[Unit]:
        """Return the units that are copied to the device: for each use, or once to be expanded."""
        return [unit for unit in units if self.tiers[unit.name] != "vram"]

    def slot_bytes(self, units: Sequence[Unit]) -> int:
        """Return the size of a slot: the largest unit that passes through."""
        return max((unit.nbytes for unit in self.outside(units)), default=0)

    def vram_bytes(self, units: Sequence[Unit]) -> int:
        """Return the device memory that packed units and slots take."""
        home = sum(unit.nbytes for unit in self.in_vram(units))
        return home + self.slots * self.slot_bytes(units)

    def host(self, units: Sequence[Unit]) -> tuple[tuple[Unit, ...], Placement]:
        """Return the host's units, numbered anew, and their placement, as `Engine` takes them."""
        outside = tuple(replace(unit, index=at) for at, unit in enumerate(self.outside(units)))
        tiers: dict[str, Tier] = {
            unit.name: "resident" if self.tiers[unit.name] == "resident" else "disk"
            for unit in outside
        }
        return outside, Placement(tiers, self.staging_bytes)

    def check(self, units: Sequence[Unit]) -> None:
        """Raise `ConfigError` unless every unit has a tier and there are slots where needed."""
        for unit in units:
            tier = self.tiers.get(unit.name)
            if tier not in get_args(HomeTier):
                raise ConfigError(
                    f"placement: unit {unit.name} must be one of {get_args(HomeTier)}, got {tier!r}"
                )
        if self.outside(units) and self.slots < 1:
            raise ConfigError("placement: units outside VRAM need at least one device slot, got 0")
