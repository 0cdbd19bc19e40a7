"""Where every unit should live, and how fast that will be, before anything is loaded.

Memory is given away in the order of its worth: the cache of the planned context, dense weights that
every step needs, scratch, staging; what is left goes to units. The search is over one number, the
share of the units that is kept expanded; the rest stays packed as far as it fits, and what is left
over is streamed. Tiers are interleaved through the depth of the model, so that the disk (or link)
works while residents compute, and stops neither.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

from endor.checkpoint.neuron_counts import NeuronCounts
from endor.errors import ConfigError
from endor.planning.beside import Way, host_products, placements
from endor.planning.busy_on_device import with_busy_neurons
from endor.planning.candidate import Candidate
from endor.planning.constants import Disk, Machine
from endor.planning.cost import Prediction, Step, kinds_of, predict
from endor.planning.decoding import decoding
from endor.planning.exchanges import with_exchanges
from endor.planning.fill import (
    fill_device,
    fill_host,
    least_device_bytes,
    least_host_bytes,
)
from endor.planning.keeping import keeping
from endor.planning.kv import SETTINGS
from endor.planning.needs import Needs
from endor.planning.outcome import Alternative, Plan
from endor.planning.products import PRODUCT_ROWS, Products, choose
from endor.planning.reserved import reserved
from endor.planning.shape import ModelShape
from endor.planning.tiers import PACKED_IN_RAM, Placement, Tier
from endor.planning.unit_cost import UnitCost, unit_costs
from endor.planning.units import Unit
from endor.planning.workload import Reservation, Workload, fixed_bytes, kv_needs

BEST = 3
"""Ways to run a model that a plan names, at most."""

EXCHANGE_ROWS = 3
"""Rows of activations that the exchange with the host holds for each input row, at most: inputs of
one product and four results in float32, of a model whose activations are several of either."""

SHARES = 20
"""Shares of expanded units that are tried, evenly spaced."""

PATIENCE = 5
"""So many shares in a row that are no faster than an earlier one end the search."""


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
    counts: NeuronCounts | None = None,
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
        counts: How often neurons are active, where the checkpoint says so.

    Raises:
        BudgetError: A budget cannot hold what must be in memory; the message has the least.
        ConfigError: The workload makes no sense, or VRAM is offered and there is no device.
    """
    return plan_costs(
        unit_costs(units, machine, shape, counts, workload.named if workload else None),
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
    kinds: Sequence[int] | None = None,
    tries: int = SHARES,
) -> Plan:
    """Return the fastest placement of units that are known by their cost; see `plan`.

    `kinds` is what `kinds_of(costs)` gives, where it is known; `tries` are the shares of expanded
    units that are tried.
    """
    workload = workload or Workload()
    workload.check(costs)
    if vram_bytes and machine.link is None:
        raise ConfigError("plan: a VRAM budget needs a CUDA device, and none was measured")
    if workload.host_compute == "on" and not vram_bytes:
        raise ConfigError(
            "host_compute='on' is for a model on a CUDA device: on the processor everything is "
            "computed there; leave it at 'auto'"
        )
    machine = machine if vram_bytes else replace(machine, link=None)
    settings = SETTINGS if workload.kv == "auto" else (workload.kv,)
    kinds = kinds_of(costs) if kinds is None else kinds
    for setting in settings:
        chosen = replace(workload, kv=setting)
        search = _Search(
            costs, kinds, shape, machine, disk, ram_bytes, vram_bytes, chosen, wishes or {}
        )
        if setting == settings[-1] or search.needs.fit:
            break
    return search.best(tries)


class _Search:
    """One run of the planner."""

    def __init__(
        self,
        costs: Sequence[UnitCost],
        kinds: Sequence[int],
        shape: ModelShape,
        machine: Machine,
        disk: Disk,
        ram_bytes: int,
        vram_bytes: int,
        workload: Workload,
        wishes: Mapping[str, Tier],
    ) -> None:
        self.costs = costs
        self.kinds = kinds
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
        # Inputs and results of what the host multiplies beside a device.
        self.beside = (
            vram_bytes > 0 and workload.product == "direct" and workload.host_compute != "off"
        )
        rows = EXCHANGE_ROWS * PRODUCT_ROWS
        self.exchange_bytes = rows * shape.activation_bytes_per_token if self.beside else 0
        self.packed_bytes = sum(cost.packed_bytes for cost in costs)
        self.dense_bytes = sum(cost.dense_bytes for cost in costs)
        steps = ((1, workload.context), (workload.prompt, workload.prompt))
        self.decode_step, self.prefill_step = (
            Step(workload.batch, tokens, context, workload.product, workload.kv)
            for tokens, context in steps
        )

    def best(self, tries: int) -> Plan:
        """Return the placement with the fastest decode step; ties keep more units packed."""
        self.needs.require(wished=bool(self.wishes))
        at = "vram" if self.vram_bytes else "ram"
        found: dict[tuple[Way, bool], Candidate] = {}
        fastest, idle = math.inf, 0
        for number in range(tries + 1):
            share = number / tries
            placed = self._place(share)
            if placed is None or idle == PATIENCE or (share and self.workload.predict):
                break  # of what is expanded no rows are left out
            idle += 1
            for way, filled in (*self._ways(placed), *self._spending(placed, share)):
                made = Candidate(way, self._predict(filled, self.decode_step), filled)
                if made.decode.seconds < fastest:
                    fastest, idle = made.decode.seconds, 0
                kind = way, share > 0 and not self.vram_bytes
                if kind not in found or made.beats(found[kind]):
                    found[kind] = made
        assert found, "share 0 places everything"
        chosen = next(iter(found.values()))
        for made in found.values():
            chosen = made if made.beats(chosen) else chosen
        way, decode = chosen.way, chosen.decode
        filled = self._exchanging(chosen)
        stays = sum(cost.packed_bytes for cost in self.costs if filled.tiers[cost.name] != "disk")
        return Plan(
            tiers=filled.tiers,
            staging_bytes=filled.staging_bytes,
            slots=filled.slots,
            reservations=reserved(
                filled, self.costs, self.fixed, at, self.exchange_bytes, self.host_kv
            ),
            ram_bytes=self.ram_bytes,
            vram_bytes=self.vram_bytes,
            decode=decode,
            prefill=self._predict(filled, self.prefill_step),
            load_s=stays / self.disk.read_gbps / 1e9,
            dense_decode=self._dense(sum(self.fixed.values())),
            packed_bytes=self.packed_bytes,
            dense_bytes=self.dense_bytes,
            workload=self.workload,
            products=self._products(filled),
            host_shares=filled.host_shares,
            exchanges=filled.exchanges,
            kept_bytes=filled.kept_bytes,
            way=way,
            alternatives=self._alternatives(chosen, found.values()),
        )

    def _exchanging(self, chosen: Candidate) -> Placement:
        """Return the placement with experts that change places, where they can."""
        filled = chosen.placement
        if not self.vram_bytes:
            return filled
        tiers = filled.tiers
        held = sum(c.packed_bytes for c in self.costs if tiers[c.name] in PACKED_IN_RAM)
        taken = held + filled.staging_bytes + self.host_kv + self.exchange_bytes
        return with_exchanges(
            filled,
            self.costs,
            self.machine,
            step_s=chosen.decode.seconds,
            rows=self.decode_step.rows,
            room=self.ram_bytes - taken,
        )

    def _ways(self, filled: Placement) -> Iterator[tuple[Way, Placement]]:
        """Yield how the units of a placement may be multiplied."""
        if not self.beside:
            return iter([("stream", filled)])
        wish = self.workload.host_compute
        ways = placements(filled, self.costs, wish, lambda p: self._predict(p, self.decode_step))
        return with_busy_neurons(ways, self.costs, self.wishes, *self._device_room())

    def _spending(self, placed: Placement, dense_share: float) -> Iterator[tuple[Way, Placement]]:
        """Yield placements that give memory to busy neurons first, or to undone entropy codes."""
        if self.vram_bytes or self.workload.product != "direct":
            return
        room = self.ram_bytes - sum(self.fixed.values())
        where = self.costs, self.wishes, room, dense_share
        kept = keeping(*where, self.disk, self.decode_step.rows)
        for each in (kept, decoding(placed, self.costs, self.wishes, room)):
            if each is not None:
                yield "stream", each

    def _alternatives(
        self, chosen: Candidate, found: Iterable[Candidate]
    ) -> tuple[Alternative, ...]:
        """Return the fastest ways, `chosen` first: what is hardly faster takes more memory."""
        others = sorted(
            (each for each in found if each is not chosen), key=lambda each: each.decode.seconds
        )
        workload = self.workload
        tokens = workload.batch * workload.prompt
        return tuple(
            Alternative(
                each.way,
                workload.batch,
                workload.kv,
                each.placement.expanded_share,
                workload.batch / each.decode.seconds,
                tokens / self._predict(each.placement, self.prefill_step).seconds,
                each.decode.bound,
                each.placement,
            )
            for each in [chosen, *others][:BEST]
        )

    def _products(self, filled: Placement) -> Products:
        if self.workload.product == "exact":
            return Products()
        if self.vram_bytes:
            return host_products(
                filled.as_used(self.costs), self.costs, self.machine, self.decode_step.rows
            )
        placed = (cost.placed(filled.tiers[cost.name]) for cost in self.costs)
        return choose(placed, self.machine)

    def _predict(self, filled: Placement, step: Step) -> Prediction:
        return predict(
            self.costs,
            filled.tiers,
            self.machine,
            self.disk,
            self.shape,
            step,
            host_shares=filled.host_shares,
            kept_bytes=filled.kept_bytes,
            kinds=self.kinds,
        )

    @property
    def needs(self) -> Needs:
        """The least memory that works."""
        fixed, host = sum(self.fixed.values()), least_host_bytes(self.costs, self.wishes)
        if not self.vram_bytes:
            return Needs(self.fixed, fixed + host, self.ram_bytes)
        device = least_device_bytes(self.costs, self.wishes)
        beside = host + self.host_kv + self.exchange_bytes
        return Needs(self.fixed, beside, self.ram_bytes, fixed + device, self.vram_bytes)

    def _place(self, dense_share: float) -> Placement | None:
        """Return the placement with so many expanded units, or None when they do not fit."""
        if self.vram_bytes:
            return fill_device(self.costs, self.wishes, *self._device_room(), dense_share)
        room = self.ram_bytes - sum(self.fixed.values())
        return fill_host(self.costs, self.wishes, room, dense_share)

    def _device_room(self) -> tuple[int, int]:
        """Return device memory and host memory for units, beside a device."""
        ram = self.ram_bytes - self.host_kv - self.exchange_bytes
        return self.vram_bytes - sum(self.fixed.values()), ram

    def _dense(self, fixed: int) -> Prediction | None:
        """Return the decode step of a plain dense model, or None when it does not fit."""
        scratch = self.fixed["scratch for expanded units"]
        budget = self.vram_bytes or self.ram_bytes
        if fixed - scratch + self.dense_bytes > budget:
            return None
        tier: Tier = "vram-dense" if self.vram_bytes else "dense"
        step = replace(self.decode_step, product="exact")
        return self._predict(Placement({cost.name: tier for cost in self.costs}, 0), step)


__all__ = ["Alternative", "Plan", "Reservation", "Workload", "fixed_bytes", "plan", "plan_costs"]
