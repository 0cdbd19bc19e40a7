"""Where each unit lives when a CUDA device computes: in its memory, in locked RAM, on disk."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

from endor.errors import BudgetError, ConfigError
from endor.offload.placement import Placement, Tier, spread
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
        staging_bytes: Host memory through which `disk` units pass.
        slots: Device slots through which everything outside VRAM passes; 0 when nothing is.
    """

    tiers: Mapping[str, HomeTier]
    staging_bytes: int
    slots: int = SLOTS

    def in_vram(self, units: Sequence[Unit]) -> list[Unit]:
        """Return the units that live on the device."""
        return [unit for unit in units if self.tiers[unit.name].startswith("vram")]

    def outside(self, units: Sequence[Unit]) -> list[Unit]:
        """Return the units that are copied for each use."""
        return [unit for unit in units if not self.tiers[unit.name].startswith("vram")]

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


def spread_on_device(
    units: Sequence[Unit],
    *,
    vram_bytes: int,
    ram_bytes: int,
    slots: int = SLOTS,
    wishes: Mapping[str, HomeTier] | None = None,
) -> DevicePlacement:
    """Return a placement that fills VRAM, then RAM, with packed units, interleaved through depth.

    A unit much larger than the others (a language model's head) goes to VRAM first: slots have the
    size of the largest unit that passes through them.

    Args:
        units: All units, in execution order.
        vram_bytes: Device memory for packed units and slots.
        ram_bytes: Host memory for packed units and staging.
        slots: Device slots; fewer are used when VRAM cannot hold so many.
        wishes: Tiers that are fixed beforehand, by unit name.

    Raises:
        BudgetError: VRAM cannot hold one slot, or RAM no staging area; the message has the least.
    """
    wishes = dict(wishes or {})
    free = [unit for unit in units if unit.name not in wishes]
    taken = sum(unit.nbytes for unit in units if wishes.get(unit.name, "").startswith("vram"))
    forced = [unit for unit in units if wishes.get(unit.name) in ("resident", "disk")]
    if not forced and taken + sum(unit.nbytes for unit in free) <= vram_bytes:
        return DevicePlacement({unit.name: wishes.get(unit.name, "vram") for unit in units}, 0, 0)
    tiers: dict[str, HomeTier] = dict(wishes)
    room = vram_bytes - taken
    sizes = sorted(unit.nbytes for unit in units)
    for unit in sorted(free, key=lambda unit: -unit.nbytes):
        others = [other for other in free if other.name not in tiers and other is not unit]
        rest = max((other.nbytes for other in others), default=0)
        outlier = unit.nbytes > 2 * sizes[len(sizes) // 2]
        if not outlier or unit.nbytes + min(slots, 2) * rest > room:
            break
        tiers[unit.name] = "vram"
        room -= unit.nbytes
    free = [unit for unit in free if unit.name not in tiers]
    largest = max((unit.nbytes for unit in (*free, *forced)), default=0)
    slots = min(slots, room // largest) if largest else 0
    if largest and slots < 1:
        raise BudgetError(
            f"packed weights need at least {taken + largest} bytes of device memory, {vram_bytes} "
            "are left for them: raise vram"
        )
    room -= slots * largest
    total, seen, placed = sum(unit.nbytes for unit in free), 0, 0
    for unit in free:
        seen += unit.nbytes
        if placed + unit.nbytes <= room * seen / total:
            placed += unit.nbytes
            tiers[unit.name] = "vram"
    for unit in free:
        if unit.name not in tiers and placed + unit.nbytes <= room:
            placed += unit.nbytes
            tiers[unit.name] = "vram"
    outside = [unit for unit in units if not tiers.get(unit.name, "").startswith("vram")]
    fixed: dict[str, Tier] = {
        unit.name: "resident" if tiers[unit.name] == "resident" else "disk" for unit in forced
    }
    host = spread(outside, ram_bytes, fixed)
    for unit in outside:
        tiers[unit.name] = "resident" if host.tiers[unit.name] == "resident" else "disk"
    return DevicePlacement(tiers, host.staging_bytes, slots)
