"""Where every unit should live, and how fast that will be, before anything is loaded.

Memory is given away in the order of its worth: the cache of the planned context, dense weights that
every step needs, scratch, staging; what is left goes to units. The search is over one number, the
share of the units that is kept expanded; the rest stays packed as far as it fits, and what is left
over is streamed. Tiers are interleaved through the depth of the model, so that the disk (or link)
works while residents compute, and stops neither.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from endor.errors import BudgetError, ConfigError
from endor.planning.cost import (
    Prediction,
    Step,
    predict,
)
from endor.planning.fill import (
    fill_device,
    fill_host,
    least_device_bytes,
    least_host_bytes,
)
from endor.planning.kv import SETTINGS
from endor.planning.machine import Disk, Machine
from endor.planning.products import Products, choose
from endor.planning.shape import ModelShape
from endor.planning.tiers import Placement, Tier
from endor.planning.unit_cost import UnitCost, unit_costs
from endor.planning.units import Unit
from endor.planning.workload import Reservation, Workload, fixed_bytes, kv_needs
from endor.sizes import size

SHARES = 20
"""Shares of expanded units that are tried, evenly spaced."""


@dataclass(frozen=True, slots=True)
class Plan:
    """A placement, what it costs in memory, and how fast it will be.

    Attributes:
        tiers: Tier per unit.
        staging_bytes: Memory that streamed units pass through.
        slots: Device slots that units outside VRAM pass through.
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
        products: How weights are multiplied where the bits need not be torch's.
    """

    tiers: Mapping[str, Tier]
    staging_bytes: int
    slots: int
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
    products: Products = field(default_factory=Products)

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
        """The plan as what moves the units takes it."""
        return Placement(self.tiers, self.staging_bytes, self.slots)

    def count(self, tier: Tier) -> int:
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
    wishes: Mapping[str, Tier] | None = None,
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
        wishes: Tiers that are fixed beforehand, by unit name: `vram`, `resident` or `disk`.

    Raises:
        BudgetError: A budget cannot hold what must be in memory; the message has the least.
        ConfigError: The workload makes no sense, or VRAM is offered and there is no device.
    """
    return plan_costs(
        unit_costs(units, machine, shape),
        shape,
        machine,
        disk,
        ram_bytes=ram_bytes,
        vram_bytes=vram_bytes,
        workload=workload,
        wishes=wishes,
    )


def plan_costs(
    costs: Sequence[UnitCost],
    shape: ModelShape,
    machine: Machine,
    disk: Disk,
    *,
    ram_bytes: int,
    vram_bytes: int = 0,
    workload: Workload | None = None,
    wishes: Mapping[str, Tier] | None = None,
) -> Plan:
    """Return the fastest placement of units that are known by their cost; see `plan`."""
    workload = workload or Workload()
    workload.check()
    if vram_bytes and machine.link is None:
        raise ConfigError("plan: a VRAM budget needs a CUDA device, and none was measured")
    machine = machine if vram_bytes else replace(machine, link=None)
    settings = SETTINGS if workload.kv == "auto" else (workload.kv,)
    for setting in settings:
        chosen = replace(workload, kv=setting)
        search = _Search(costs, shape, machine, disk, ram_bytes, vram_bytes, chosen, wishes or {})
        if setting == settings[-1] or search.fits:
            break
    return search.best()


def combine(plans: Sequence[Plan]) -> Plan:
    """Return one plan for the ranges of a model on several devices.

    A step passes from device to device, so what they compute adds up; their links work at the
    same time, each ahead of its range; they share a disk.
    """
    if len(plans) == 1:
        return plans[0]

    def step(steps: Sequence[Prediction]) -> Prediction:
        resources = {
            "gpu": sum(each.resources["gpu"] for each in steps),
            "link": max(each.resources["link"] for each in steps),
            "disk": sum(each.resources["disk"] for each in steps),
        }
        bound = max(resources, key=lambda name: resources[name])
        unhidden = sum(each.unhidden for each in steps)
        return Prediction(
            resources[bound] + unhidden,
            bound,
            resources,
            {name: sum(each.parts[name] for each in steps) for name in steps[0].parts},
            unhidden,
            sum(each.disk_bytes for each in steps),
            sum(each.link_bytes for each in steps),
        )

    dense = [each.dense_decode for each in plans]
    return Plan(
        tiers={name: tier for each in plans for name, tier in each.tiers.items()},
        staging_bytes=sum(each.staging_bytes for each in plans),
        slots=sum(each.slots for each in plans),
        reservations=tuple(item for each in plans for item in each.reservations),
        ram_bytes=sum(each.ram_bytes for each in plans),
        vram_bytes=sum(each.vram_bytes for each in plans),
        decode=step([each.decode for each in plans]),
        prefill=step([each.prefill for each in plans]),
        load_s=sum(each.load_s for each in plans),
        dense_decode=None if None in dense else step([item for item in dense if item]),
        packed_bytes=sum(each.packed_bytes for each in plans),
        dense_bytes=sum(each.dense_bytes for each in plans),
        workload=plans[0].workload,
    )


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
        wishes: Mapping[str, Tier],
    ) -> None:
        self.costs = costs
        self.shape = shape
        self.machine = machine
        self.disk = disk
        self.ram_bytes = ram_bytes
        self.vram_bytes = vram_bytes
        self.workload = workload
        self.wishes = wishes
        self.fixed = fixed_bytes(shape, costs, workload, on_device=vram_bytes > 0)
        # Host memory that the cache takes beside a device.
        self.host_kv = kv_needs(shape, workload, on_device=vram_bytes > 0).ram
        self.packed_bytes = sum(cost.packed_bytes for cost in costs)
        self.dense_bytes = sum(cost.dense_bytes for cost in costs)
        self.decode_step = Step(workload.batch, 1, workload.context, workload.product)
        self.prefill_step = Step(workload.batch, workload.prompt, workload.prompt, workload.product)

    def best(self) -> Plan:
        """Return the placement with the fastest decode step; ties keep more units packed."""
        self._require()
        at = _computes_in(self.vram_bytes)
        found: tuple[Prediction, Placement] | None = None
        for number in range(SHARES + 1):
            filled = self._place(number / SHARES)
            if filled is None:
                break
            prediction = self._predict(filled.tiers, self.decode_step)
            # A hundredth is noise: do not spend memory on it.
            if found is None or prediction.seconds < 0.99 * found[0].seconds:
                found = prediction, filled
        assert found is not None, "share 0 places everything"
        decode, filled = found
        reservations = [Reservation(what, at, nbytes) for what, nbytes in self.fixed.items()]
        if filled.slots:
            nbytes = filled.slots * max(
                (c.packed_bytes for c in self.costs if filled.tiers[c.name] != "vram"), default=0
            )
            reservations.append(Reservation("device slots", "vram", nbytes))
        if self.host_kv:
            reservations.append(Reservation("cache of keys and values", "ram", self.host_kv))
        if filled.staging_bytes:
            reservations.append(Reservation("staging and read-ahead", "ram", filled.staging_bytes))
        stays = sum(cost.packed_bytes for cost in self.costs if filled.tiers[cost.name] != "disk")
        return Plan(
            tiers=filled.tiers,
            staging_bytes=filled.staging_bytes,
            slots=filled.slots,
            reservations=tuple(reservations),
            ram_bytes=self.ram_bytes,
            vram_bytes=self.vram_bytes,
            decode=decode,
            prefill=self._predict(filled.tiers, self.prefill_step),
            load_s=stays / self.disk.read_gbps / 1e9,
            dense_decode=self._dense(sum(self.fixed.values())),
            packed_bytes=self.packed_bytes,
            dense_bytes=self.dense_bytes,
            workload=self.workload,
            products=self._products(),
        )

    def _products(self) -> Products:
        if self.workload.product == "exact" or self.vram_bytes:
            return Products()
        return choose(self.costs, self.machine)

    def _predict(self, tiers: Mapping[str, Tier], step: Step) -> Prediction:
        return predict(self.costs, tiers, self.machine, self.disk, self.shape, step)

    @property
    def fits(self) -> bool:
        """Whether what must be in memory fits the budgets."""
        return all(least <= budget for least, budget in self._needs().values())

    def _needs(self) -> dict[str, tuple[int, int]]:
        """Return (least bytes that work, budget) by place."""
        fixed, host = sum(self.fixed.values()), least_host_bytes(self.costs, self.wishes)
        if not self.vram_bytes:
            return {"ram": (fixed + host, self.ram_bytes)}
        device = least_device_bytes(self.costs, self.wishes)
        return {
            "vram": (fixed + device, self.vram_bytes),
            "ram": (host + self.host_kv, self.ram_bytes),
        }

    def _require(self) -> None:
        """Raise `BudgetError` unless what must be in memory fits."""
        for where, (least, budget) in self._needs().items():
            if budget < least:
                parts = self.fixed if where == _computes_in(self.vram_bytes) else {}
                detail = "".join(f"{what} {size(nbytes)}, " for what, nbytes in parts.items())
                wished = "" if self.wishes else " with every unit on disk"
                raise BudgetError(
                    f"plan: the {where} budget must be at least {size(least)} ({least} bytes)"
                    f"{wished}, got {size(budget)}: {detail}the rest for units on their way; "
                    f"raise {where}, or plan for a shorter context, prompt or batch"
                )

    def _place(self, dense_share: float) -> Placement | None:
        """Return the placement with so many expanded units, or None when they do not fit."""
        fixed = sum(self.fixed.values())
        if self.vram_bytes:
            room = self.vram_bytes - fixed
            ram = self.ram_bytes - self.host_kv
            return fill_device(self.costs, self.wishes, room, ram, dense_share)
        return fill_host(self.costs, self.wishes, self.ram_bytes - fixed, dense_share)

    def _dense(self, fixed: int) -> Prediction | None:
        """Return the decode step of a plain dense model, or None when it does not fit."""
        scratch = self.fixed["scratch for expanded units"]
        budget = self.vram_bytes or self.ram_bytes
        if fixed - scratch + self.dense_bytes > budget:
            return None
        tier: Tier = "vram-dense" if self.vram_bytes else "dense"
        step = replace(self.decode_step, product="exact")
        return self._predict({cost.name: tier for cost in self.costs}, step)


def _computes_in(vram_bytes: int) -> str:
    """Return where computing takes its memory."""
    return "vram" if vram_bytes else "ram"


__all__ = ["Plan", "Reservation", "Workload", "combine", "fixed_bytes", "plan", "plan_costs"]
