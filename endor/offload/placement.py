"""Where each unit lives between uses, and how much memory that takes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from endor.errors import BudgetError, ConfigError
from endor.offload.units import Unit
from endor.sizes import parse_bytes

__all__ = ["Placement", "Tier", "available_bytes", "parse_bytes"]

Tier = Literal["dense", "resident", "disk"]
"""`dense`: expanded once and kept; `resident`: kept packed; `disk`: read for every use."""

STAGING_AHEAD_BYTES = 256 << 20
"""Read-ahead that the default staging area leaves room for, beside the largest unit."""

_CGROUP = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


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


def available_bytes() -> int:
    """Return the memory that this process may still take: nine tenths of what is available."""
    limits = []
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            limits.append(int(line.split()[1]) * 1024)
    for path in _CGROUP:
        try:
            text = Path(path).read_text().strip()
        except OSError:
            continue
        if text.isdigit():
            limits.append(int(text))
    return min(limits, default=1 << 40) * 9 // 10
