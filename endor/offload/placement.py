"""Where each unit lives between uses, and how much memory that takes."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from endor.errors import BudgetError, ConfigError
from endor.offload.units import Unit

Tier = Literal["dense", "resident", "disk"]
"""`dense`: expanded once and kept; `resident`: kept packed; `disk`: read for every use."""

STAGING_AHEAD_BYTES = 256 << 20
"""Read-ahead that the default staging area leaves room for, beside the largest unit."""

_SIZE = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([KMGT]?i?)B?\s*", re.IGNORECASE)


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


def parse_bytes(size: int | str, what: str = "size") -> int:
    """Return a size in bytes from `8589934592`, `"8GiB"`, `"500MB"` or `"1.5 G"`.

    `K`, `M`, `G`, `T` are powers of 1000; with an `i`, of 1024.

    Raises:
        ConfigError: It is not a size.
    """
    if isinstance(size, int) and not isinstance(size, bool) and size >= 0:
        return size
    match = _SIZE.fullmatch(size) if isinstance(size, str) else None
    if match is None:
        raise ConfigError(f"{what} must be bytes or text such as '8GiB' or '500MB', got {size!r}")
    number, prefix = match.groups()
    power = " KMGT".index(prefix[0].upper()) if prefix else 0
    return int(float(number) * (1024 if len(prefix) == 2 else 1000) ** power)
