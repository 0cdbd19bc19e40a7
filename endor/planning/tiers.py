"""Where each unit lives between uses, and how much memory that takes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol, TypeVar

from endor.errors import BudgetError, ConfigError
from endor.planning.units import Unit
from endor.sizes import parse_bytes

__all__ = ["Placement", "Tier", "parse_bytes"]

Tier = Literal["vram-dense", "vram", "dense", "decoded", "resident", "host", "disk"]
"""`vram-dense`: expanded once and kept on the device; `vram`: packed on the device; `dense`:
expanded once and kept in RAM; `decoded`: in RAM as bitmap and elements, the entropy code undone,
which some processors multiply by faster; `resident`: packed in RAM, page-locked beside a device;
`host`: the same beside a device, and few rows are multiplied there; `disk`: read for every use."""

HOST_TIERS: tuple[Tier, ...] = ("dense", "decoded", "resident", "disk")
"""Where a unit can live when the processor computes."""

DEVICE_TIERS: tuple[Tier, ...] = ("vram-dense", "vram", "resident", "host", "disk")
"""Where a unit can live when a device computes."""

PACKED_IN_RAM: tuple[Tier, ...] = ("decoded", "resident", "host")
"""Tiers whose bytes stay in host memory once they were read."""

STAGING_AHEAD_BYTES = 256 << 20
"""Read-ahead that the default staging area leaves room for, beside the largest unit."""

COPY_PIECE_BYTES = 2 << 20
"""Of a unit's copy to a device, where the host multiplies too: a result that goes up waits for one
piece, a tenth of a millisecond, and not for all of a unit."""

SLOTS = 3
"""Device slots: units in flight. Two leave the link idle a fifth of the time."""


class Placed(Protocol):
    """A unit, or what one costs: see `endor.planning.units.Unit`."""

    @property
    def name(self) -> str: ...

    @property
    def scheduled(self) -> bool: ...


Item = TypeVar("Item", bound=Placed)


@dataclass(frozen=True, slots=True)
class Exchanges:
    """When an expert in host memory takes the place of one in VRAM.

    Attributes:
        gain: Time that one use of an expert saves where it lies in VRAM, in times of its copy.
        step_bytes: Bytes that are copied for this in a step, at most; one expert at least.
    """

    gain: float
    step_bytes: int

    def check(self) -> None:
        """Raise `ConfigError` unless the numbers make sense."""
        if not 0.0 <= self.gain < float("inf") or self.step_bytes < 0:
            raise ConfigError(
                f"placement: exchanges need a finite gain and bytes of at least 0, got {self}"
            )


@dataclass(frozen=True, slots=True)
class Placement:
    """A tier for every unit.

    Attributes:
        tiers: Tier per unit name.
        staging_bytes: Host memory through which units pass that live neither in RAM nor packed in
            VRAM; at least the largest of them.
        slots: Device slots through which everything passes that is not packed in VRAM; 0 without
            a device, or when nothing does.
        host_shares: Of units in tier `host`, the share of each matrix's rows that is multiplied
            there while the others are copied; all of them where it is not said.
        exchanges: When experts packed in VRAM change places with those packed in RAM; None where
            all stay. Their tiers are then where they begin, and RAM holds all of them.
        kept_bytes: Of units on disk, or in tier `host`, that are stored by neuron: the memory, or
            device memory, in which what busy neurons need stays; none where it is not said.
    """

    tiers: Mapping[str, Tier]
    staging_bytes: int
    slots: int = 0
    host_shares: Mapping[str, float] = field(default_factory=dict)
    exchanges: Exchanges | None = None
    kept_bytes: Mapping[str, int] = field(default_factory=dict)

    @property
    def expanded_share(self) -> float:
        """Which share of the units is kept expanded."""
        kept = sum(tier in ("dense", "vram-dense") for tier in self.tiers.values())
        return kept / max(1, len(self.tiers))

    def pool(self, units: Sequence[Item]) -> list[Item]:
        """Return the experts that change places: all packed in VRAM or RAM, where none is on disk.

        Those beside a cache of experts from disk keep their places.
        """
        routed = [unit for unit in units if not unit.scheduled]
        tiers = {self.tiers[unit.name] for unit in routed}
        if self.exchanges is None or "vram" not in tiers or "disk" in tiers:
            return []
        if not tiers.intersection(PACKED_IN_RAM):
            return []
        return [unit for unit in routed if self.tiers[unit.name] in ("vram", *PACKED_IN_RAM)]

    def moving(self, units: Sequence[Item]) -> list[Item]:
        """Return those of the pool that begin in VRAM."""
        return [unit for unit in self.pool(units) if self.tiers[unit.name] == "vram"]

    def as_used(self, units: Sequence[Placed]) -> "Placement":
        """Return where units are used from that may not be in VRAM: experts of the pool, from RAM.

        Where the host multiplies any of them, it multiplies all that are not in VRAM.
        """
        pool, moving = self.pool(units), self.moving(units)
        hosted = any(self.tiers[unit.name] == "host" for unit in pool)
        tier: Tier = "host" if hosted else "resident"
        return replace(self, tiers={**self.tiers, **dict.fromkeys((u.name for u in moving), tier)})

    def outside(self, units: Sequence[Unit]) -> list[Unit]:
        """Return the units that are copied to a device: for each use, or once to be expanded."""
        return [unit for unit in units if self.tiers[unit.name] != "vram"]

    def slot_bytes(self, units: Sequence[Unit]) -> int:
        """Return the size of a slot: the largest unit that passes through."""
        return max((unit.nbytes for unit in self.outside(units)), default=0)

    def check(self, units: Sequence[Unit], *, on_device: bool = False) -> None:
        """Raise unless every unit has a tier, and a slot to pass through where it needs one.

        Raises:
            ConfigError: A unit has no tier, or one that is not to be had there, or no slot.
        """
        known = DEVICE_TIERS if on_device else HOST_TIERS
        if self.exchanges is not None:
            self.exchanges.check()
        for unit in units:
            tier = self.tiers.get(unit.name)
            if tier not in known:
                at = "with a device" if on_device else "without a device"
                raise ConfigError(
                    f"placement: unit {unit.name} must be {', '.join(known[:-1])} or {known[-1]} "
                    f"{at}, got {tier!r}"
                )
            share = self.host_shares.get(unit.name, 1.0)
            if not 0.0 <= share <= 1.0:
                raise ConfigError(
                    f"placement: the host's share of unit {unit.name} must lie in 0..1, got {share}"
                )
            if not 0 <= self.kept_bytes.get(unit.name, 0) <= unit.nbytes:
                raise ConfigError(
                    f"placement: what is kept of unit {unit.name} must be 0 to {unit.nbytes} "
                    f"bytes, got {self.kept_bytes[unit.name]}"
                )
            if tier == "host" and share < 1.0 and self.kept_bytes.get(unit.name):
                raise ConfigError(
                    f"placement: unit {unit.name} is shared out by neuron, and cannot be by row, "
                    f"too: the host's share must be 1, got {share}"
                )
        if on_device and self.outside(units) and self.slots < 1:
            raise ConfigError("placement: units outside VRAM need at least one device slot, got 0")

    def check_staging(self, units: Sequence[Unit]) -> None:
        """Raise unless the staging area holds any of the units that pass through it.

        Raises:
            BudgetError: It is too small.
        """
        for unit in units:
            if self.tiers[unit.name] not in PACKED_IN_RAM and unit.nbytes > self.staging_bytes:
                raise BudgetError(
                    f"placement: staging must hold {unit.name} ({unit.nbytes} bytes), "
                    f"got {self.staging_bytes} bytes"
                )
