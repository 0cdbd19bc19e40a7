"""Where every unit should live, and how fast that will be, before anything is loaded.

Memory is given away in the order of its worth: the cache of the planned context, dense weights that
every step needs, scratch, staging; what is left goes to units. The search is over one number, the
share of the units that is kept expanded; the rest stays packed as far as it fits, and what is left
over is streamed. Tiers are interleaved through the depth of the model, so that the disk (or link)
works while residents compute, and stops neither.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from endor.errors import BudgetError, ConfigError
from endor.offload.costs import (
    DeviceTier,
    ModelShape,
    Prediction,
    Product,
    Step,
    UnitCost,
    predict,
    unit_costs,
)
from endor.offload.hardware import Disk, Machine
from endor.offload.placement import STAGING_AHEAD_BYTES, Placement, Tier
from endor.offload.units import Unit

SHARES = 20
"""Shares of expanded units that are tried, evenly spaced."""

STAGING_UNITS = 4
"""Largest units that the staging area holds: one in use, one being read, two for uneven reads."""

DEVICE_SLOTS = 3
"""Packed units in flight on a device: two leave the link idle a fifth of the time."""


@dataclass(frozen=True, slots=True)
class Reservation:
    """Memory that is spoken for before any unit gets some.

    Attributes:
        what: Its purpose.
        where: `ram` or `vram`.
        nbytes: Its size.
    """

    what: str
    where: str
    nbytes: int


@dataclass(frozen=True, slots=True)
class Workload:
    """What the model will be used for.

    Attributes:
        batch: Sequences at once.
        prompt: Tokens of each prompt.
        context: Tokens that the cache must hold, prompt included.
        product: How weights are multiplied at batch 1.
    """

    batch: int = 1
    prompt: int = 128
    context: int = 1024
    product: Product = "exact"

    def check(self) -> None:
        """Raise `ConfigError` unless the numbers make sense."""
        if min(self.batch, self.prompt) < 1 or self.context < self.prompt:
            raise ConfigError(
                "plan: batch and prompt must be at least 1 and the context must hold the prompt, "
                f"got batch {self.batch}, prompt {self.prompt}, context {self.context}"
            )


@dataclass(frozen=True, slots=True)
class Plan:
    """A placement, what it costs in memory, and how fast it will be.

    Attributes:
        tiers: Tier per unit.
        staging_bytes: Memory that streamed units pass through.
        reservations: Memory given away first.
        ram_bytes: The budget.
        vram_bytes: The device's budget; 0 on the processor.
        decode: One decode step.
        prefill: The whole prompt in one step.
        load_s: Reading what stays in memory, once.
        dense_decode: The same step of a plain dense model, if that fits the budgets.
        packed_bytes: All units, packed.
        dense_bytes: All units, expanded.
        workload: What was planned for.
    """

    tiers: Mapping[str, DeviceTier]
    staging_bytes: int
    reservations: tuple[Reservation, ...]
    ram_bytes: int
    vram_bytes: int
    decode: Prediction
    prefill: Prediction
    load_s: float
    dense_decode: Prediction | None
    packed_bytes: int
    dense_bytes: int
    workload: Workload

    @property
    def decode_tokens_per_s(self) -> float:
        return self.workload.batch / self.decode.seconds

    @property
    def prefill_tokens_per_s(self) -> float:
        return self.workload.batch * self.workload.prompt / self.prefill.seconds

    @property
    def dense_is_faster(self) -> bool:
        """Whether an ordinary dense model fits and decodes at least as fast."""
        return self.dense_decode is not None and self.dense_decode.seconds <= self.decode.seconds

    @property
    def placement(self) -> Placement:
        """The host side of the plan, as the engine takes it; a device's units count as streamed."""
        host: dict[str, Tier] = {
            name: "disk" if tier in ("vram", "vram-dense") else tier  # type: ignore[misc]
            for name, tier in self.tiers.items()
        }
        return Placement(host, self.staging_bytes)

    def count(self, tier: DeviceTier) -> int:
        """Return how many units live in `tier`."""
        return sum(found == tier for found in self.tiers.values())


def plan(
    units: Sequence[Unit],
    shape: ModelShape,
    machine: Machine,
    disk: Disk,
    *,
    ram_bytes: int,
    vram_bytes: int = 0,
    workload: Workload | None = None,
) -> Plan:
    """Return the fastest placement found for `units` within the budgets.

    Args:
        units: All units, in execution order.
        shape: The rest of the model.
        machine: Its constants; those of its link are used when `vram_bytes` is given.
        disk: Where the packed files lie.
        ram_bytes: Host memory for weights, cache and scratch.
        vram_bytes: Device memory for the same; 0 plans for the processor.
        workload: What it is for.

    Raises:
        BudgetError: A budget cannot hold what must be in memory; the message has the least.
        ConfigError: The workload makes no sense, or VRAM is offered and there is no device.
    """
    workload = workload or Workload()
    workload.check()
    if vram_bytes and machine.link is None:
        raise ConfigError("plan: a VRAM budget needs a CUDA device, and none was measured")
    machine = machine if vram_bytes else replace(machine, link=None)
    costs = unit_costs(units, machine, shape)
    search = _Search(costs, shape, machine, disk, ram_bytes, vram_bytes, workload)
    return search.best()


def fixed_bytes(shape: ModelShape, costs: Sequence[UnitCost], workload: Workload) -> dict[str, int]:
    """Return the memory that computing needs whatever the placement, by purpose."""
    rows = workload.batch * workload.prompt
    return {
        "cache of keys and values": shape.kv_bytes_per_token * workload.context * workload.batch,
        "weights outside the units": shape.other_bytes,
        "scratch for one expanded unit": max((cost.dense_bytes for cost in costs), default=0),
        "activations": rows * shape.activation_bytes_per_token + workload.batch * shape.vocab * 8,
    }


class _Search:
    """One run of the planner."""

    def __init__(
        self,
        costs: Sequence[UnitCost],
        shape: ModelShape,
        machine: Machine,
        disk: Disk,
        ram_bytes: int,
        vram_bytes: int,
        workload: Workload,
    ) -> None:
        self.costs = costs
        self.shape = shape
        self.machine = machine
        self.disk = disk
        self.ram_bytes = ram_bytes
        self.vram_bytes = vram_bytes
        self.workload = workload
        self.largest = max((cost.packed_bytes for cost in costs), default=0)
        self.packed_bytes = sum(cost.packed_bytes for cost in costs)
        self.dense_bytes = sum(cost.dense_bytes for cost in costs)
        self.decode_step = Step(workload.batch, 1, workload.context, workload.product)
        self.prefill_step = Step(workload.batch, workload.prompt, workload.prompt, workload.product)

    def best(self) -> Plan:
        """Return the placement with the fastest decode step; ties keep more units packed."""
        fixed = fixed_bytes(self.shape, self.costs, self.workload)
        self._require(fixed)
        at = "vram" if self.vram_bytes else "ram"
        found: tuple[Prediction, dict[str, DeviceTier], int] | None = None
        for number in range(SHARES + 1):
            placed = self._place(number / SHARES, sum(fixed.values()))
            if placed is None:
                break
            tiers, staging = placed
            prediction = self._predict(tiers, self.decode_step)
            # A hundredth is noise: do not spend memory on it.
            if found is None or prediction.seconds < 0.99 * found[0].seconds:
                found = prediction, tiers, staging
        assert found is not None, "share 0 places everything"
        decode, tiers, staging = found
        reservations = [Reservation(what, at, nbytes) for what, nbytes in fixed.items()]
        if self.vram_bytes:
            reservations.append(Reservation("device slots", "vram", self._slot_bytes()))
        if staging:
            reservations.append(Reservation("staging and read-ahead", "ram", staging))
        stays = sum(cost.packed_bytes for cost in self.costs if tiers[cost.name] != "disk")
        return Plan(
            tiers=tiers,
            staging_bytes=staging,
            reservations=tuple(reservations),
            ram_bytes=self.ram_bytes,
            vram_bytes=self.vram_bytes,
            decode=decode,
            prefill=self._predict(tiers, self.prefill_step),
            load_s=stays / self.disk.read_gbps / 1e9,
            dense_decode=self._dense(sum(fixed.values())),
            packed_bytes=self.packed_bytes,
            dense_bytes=self.dense_bytes,
            workload=self.workload,
        )

    def _predict(self, tiers: Mapping[str, DeviceTier], step: Step) -> Prediction:
        return predict(self.costs, tiers, self.machine, self.disk, self.shape, step)

    def _require(self, fixed: Mapping[str, int]) -> None:
        """Raise `BudgetError` unless what must be in memory fits."""
        needs = {"vram": sum(fixed.values()) + self._slot_bytes(), "ram": self.largest}
        if not self.vram_bytes:
            needs = {"ram": sum(fixed.values()) + min(2 * self.largest, self.packed_bytes)}
        for where, least in needs.items():
            budget = self.vram_bytes if where == "vram" else self.ram_bytes
            if budget < least:
                detail = ", ".join(f"{what} {size(nbytes)}" for what, nbytes in fixed.items())
                raise BudgetError(
                    f"plan: the {where} budget must be at least {size(least)} ({least} bytes) with "
                    f"every unit on disk, got {size(budget)}: {detail}, the rest for units on "
                    f"their way; raise --{where} or lower --context, --prompt or --batch"
                )

    def _slot_bytes(self) -> int:
        return min(DEVICE_SLOTS * self.largest, self.packed_bytes)

    def _place(self, dense_share: float, fixed: int) -> tuple[dict[str, DeviceTier], int] | None:
        """Return (tiers, staging bytes), or None when so many expanded units do not fit."""
        tiers: dict[str, DeviceTier] = {}
        rest = list(self.costs)
        if self.vram_bytes:
            room = self.vram_bytes - fixed - self._slot_bytes()
            rest, room = self._fill(rest, tiers, "vram-dense", room, dense_share)
            if dense_share and not any(tier == "vram-dense" for tier in tiers.values()):
                return None
            rest, _ = self._fill(rest, tiers, "vram", room, 1.0)
            ram, dense_share = self.ram_bytes, 0.0
        else:
            ram = self.ram_bytes - fixed
        staging = self._staging(rest, ram)
        everything = sum(cost.packed_bytes for cost in rest)
        # Units bound for a device pass through host memory when they are loaded.
        passage = self.largest if self.vram_bytes else 0
        if dense_share == 0 and everything + passage <= ram:
            tiers |= dict.fromkeys((cost.name for cost in rest), "resident")
            return tiers, passage
        room = ram - staging
        if dense_share:
            before = len(tiers)
            rest, room = self._fill(rest, tiers, "dense", room, dense_share)
            if len(tiers) == before:
                return None
        rest, _ = self._fill(rest, tiers, "resident", room, 1.0)
        tiers |= dict.fromkeys((cost.name for cost in rest), "disk")
        return tiers, staging

    def _staging(self, rest: Sequence[UnitCost], budget: int) -> int:
        """Room for a few of the largest units, before any is resident.

        Less makes reading and computing take turns; more would only keep fewer units resident.
        """
        largest = max((cost.packed_bytes for cost in rest), default=0)
        everything = sum(cost.packed_bytes for cost in rest)
        ahead = min((STAGING_UNITS - 1) * largest, STAGING_AHEAD_BYTES, everything - largest)
        return max(largest, min(largest + ahead, budget))

    def _fill(
        self,
        free: Sequence[UnitCost],
        tiers: dict[str, DeviceTier],
        tier: DeviceTier,
        room: int,
        share: float,
    ) -> tuple[list[UnitCost], int]:
        """Give `tier` to a share of the `free` units, evenly through depth; return (rest, room).

        Units that every step needs come before experts. Within each kind, a unit is chosen when
        the chosen bytes fall behind their share of the bytes seen; what still fits is added last.
        """
        chosen: set[str] = set()
        for scheduled in (True, False):
            group = [cost for cost in free if cost.scheduled is scheduled]
            sizes = [self._bytes_in(cost, tier) for cost in group]
            total = sum(sizes)
            if not total:
                continue
            wanted = min(share, room / total)
            seen = taken = 0
            later = []
            for cost, nbytes in zip(group, sizes, strict=True):
                seen += nbytes
                if nbytes <= room and taken + nbytes <= wanted * seen + nbytes / 2:
                    taken += nbytes
                    room -= nbytes
                    chosen.add(cost.name)
                else:
                    later.append((cost, nbytes))
            if share == 1.0:
                for cost, nbytes in later:
                    if nbytes <= room:
                        room -= nbytes
                        chosen.add(cost.name)
        tiers |= dict.fromkeys(chosen, tier)
        return [cost for cost in free if cost.name not in chosen], room

    def _bytes_in(self, cost: UnitCost, tier: DeviceTier) -> int:
        return cost.dense_bytes if tier in ("dense", "vram-dense") else cost.packed_bytes

    def _dense(self, fixed: int) -> Prediction | None:
        """Return the decode step of a plain dense model, or None when it does not fit."""
        scratch = max((cost.dense_bytes for cost in self.costs), default=0)
        budget = self.vram_bytes or self.ram_bytes
        if fixed - scratch + self.dense_bytes > budget:
            return None
        tier: DeviceTier = "vram-dense" if self.vram_bytes else "dense"
        return self._predict({cost.name: tier for cost in self.costs}, self.decode_step)


def size(nbytes: float) -> str:
    """Return `nbytes` for a reader, in binary units as budgets are given."""
    for unit in ("B", "KiB", "MiB"):
        if nbytes < 1024:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1024
    return f"{nbytes:.2f} GiB"


__all__ = ["Plan", "Reservation", "Workload", "fixed_bytes", "plan", "size"]
