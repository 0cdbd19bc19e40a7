"""Where each unit lives between uses, and how much memory that takes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from endor.errors import BudgetError, ConfigError
from endor.offload.units import Unit
from endor.sizes import parse_bytes

__all__ = ["Placement", "Tier", "parse_bytes"]

Tier = Literal["dense", "resident", "disk"]
"""`dense`: expanded once and kept; `resident`: kept packed; `disk`: read for every use."""

STAGING_AHEAD_BYTES = 256 << 20
"""Read-ahead that the default staging area leaves room for, beside the largest unit."""


@dataclass(frozen=True, slots=True)
class Placement:
    """A tier for every unit.

    Attributes:
        tiers: Tier per unit name.
        staging_bytes: Host memory through which `disk` and `dense` units pass; at least the
            largest of them.
    """

    tiers: Mapping[str, Tier]
    staging_bytes: int

    def bytes_in(self, tier: Tier, units: Sequence[Unit]) -> int:
        """Return the packed bytes of the units in `tier`."""
        return sum(unit.nbytes for unit in units if self.tiers[unit.name] == tier)

    def check(self, units: Sequence[Unit]) -> None:
        """Raise unless every unit has a tier and the staging area holds any unit that passes it.

        Raises:
            ConfigError: A unit has no tier, or an unknown one.
            BudgetError: The staging area is too small.
        """
        for unit in units:
            tier = self.tiers.get(unit.name)
            if tier not in ("dense", "resident", "disk"):
                raise ConfigError(
                    f"placement: unit {unit.name} must be dense, resident or disk, got {tier!r}"
                )
            if tier != "resident" and unit.nbytes > self.staging_bytes:
                raise BudgetError(
                    f"placement: staging must hold {unit.name} ({unit.nbytes} bytes), "
                    f"got {self.staging_bytes} bytes"
                )
