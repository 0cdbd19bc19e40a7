"""The least memory that a plan can be made with."""

from collections.abc import Mapping
from dataclasses import dataclass

from endor.errors import BudgetError
from endor.sizes import size


@dataclass(frozen=True, slots=True)
class Needs:
    """What must be in memory, and the budgets for it.

    Attributes:
        fixed: Memory that computing needs whatever the placement, by purpose.
        least_ram: The least host memory that works.
        ram_bytes: Its budget.
        least_vram: The least device memory; 0 without a device.
        vram_bytes: Its budget; 0 without a device.
    """

    fixed: Mapping[str, int]
    least_ram: int
    ram_bytes: int
    least_vram: int = 0
    vram_bytes: int = 0

    @property
    def fit(self) -> bool:
        """Whether the budgets suffice."""
        return self.least_ram <= self.ram_bytes and self.least_vram <= self.vram_bytes

    def require(self, *, wished: bool) -> None:
        """Raise `BudgetError` unless the budgets suffice.

        Args:
            wished: Whether some units must be in memory because a caller wants them there.
        """
        computes = "vram" if self.vram_bytes else "ram"
        places = (
            ("vram", self.least_vram, self.vram_bytes),
            ("ram", self.least_ram, self.ram_bytes),
        )
        for where, least, budget in places:
            if budget < least:
                parts = self.fixed if where == computes else {}
                detail = "".join(f"{what} {size(nbytes)}, " for what, nbytes in parts.items())
                everywhere = "" if wished else " with every unit on disk"
                raise BudgetError(
                    f"plan: the {where} budget must be at least {size(least)} ({least} bytes)"
                    f"{everywhere}, got {size(budget)}: {detail}the rest for units on their way; "
                    f"raise {where}, or plan for a shorter context, prompt or batch"
                )
