"""Where each unit lives between uses, and how much memory that takes."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from endor.errors import BudgetError, ConfigError
from endor.offload.units import Unit

Tier = Literal["dense", "resident", "disk"]
"""`dense`: expanded once and kept; `resident`: kept packed; `disk`: read for every use."""

STAGING_AHEAD_BYTES = 256 << 20
"""Read-ahead that the default staging area leaves room for, beside the largest unit."""

_SIZE = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([KMGT]?i?)B?\s*", re.IGNORECASE)
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


def spread(
    units: Sequence[Unit], budget_bytes: int, wishes: Mapping[str, Tier] | None = None
) -> Placement:
    """Return a placement that fills `budget_bytes` with packed units, interleaved through depth.

    Streamed units are spread evenly between resident ones: reads of the next streamed unit then
    overlap the work on residents, where a contiguous split would leave the disk idle for half of
    every token.

    Args:
        units: All units, in execution order.
        budget_bytes: Memory for resident units and staging together.
        wishes: Tiers that are fixed beforehand, by unit name.

    Raises:
        BudgetError: Not even a staging area for the largest unit fits; the message has the least
            budget that works.
    """
    wishes = wishes or {}
    tiers: dict[str, Tier] = {unit.name: wishes.get(unit.name, "resident") for unit in units}
    free = [unit for unit in units if unit.name not in wishes]
    pinned = sum(unit.nbytes for unit in units if wishes.get(unit.name) == "resident")
    streamed = [unit for unit in units if tiers[unit.name] != "resident"]
    staging = _staging_bytes(streamed, max(0, budget_bytes - pinned))
    if pinned + staging + sum(unit.nbytes for unit in free) <= budget_bytes:
        return Placement(tiers, staging)
    staging = _staging_bytes([*streamed, *free], max(0, budget_bytes - pinned))
    if pinned + staging > budget_bytes:
        raise BudgetError(
            f"packed weights need at least {pinned + staging} bytes of memory, "
            f"{max(0, budget_bytes)} are left for them: raise the budget"
        )
    room = budget_bytes - pinned - staging
    total = sum(unit.nbytes for unit in free)
    seen = placed = 0
    skipped = []
    for unit in free:
        seen += unit.nbytes
        if placed + unit.nbytes <= room * seen / total:
            placed += unit.nbytes
        else:
            tiers[unit.name] = "disk"
            skipped.append(unit)
    for unit in skipped:
        if placed + unit.nbytes <= room:
            placed += unit.nbytes
            tiers[unit.name] = "resident"
    return Placement(tiers, staging)


def _staging_bytes(units: Sequence[Unit], budget_bytes: int) -> int:
    """Room for the largest unit and a read-ahead, together at most half the budget if they can."""
    if not units:
        return 0
    largest = max(unit.nbytes for unit in units)
    ahead = min(STAGING_AHEAD_BYTES, sum(unit.nbytes for unit in units) - largest)
    return max(largest, min(largest + ahead, budget_bytes // 2))


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
