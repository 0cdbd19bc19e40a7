"""How long a step takes, from measured constants: the arithmetic behind `endor plan`.

A step is one forward pass: `batch` sequences, each `tokens` new tokens long. On the processor, for
units u with packed bytes p, dense bytes w, rows r = batch * tokens and the share `use` of steps
that need the unit (1 but for experts):

    T_disk  = sum over disk units of  use * p / B_disk
    T_cpu   = sum over all units of   use * (w / B_expand, unless dense)
            + max(use * w / B_linear, 2 r n / F)
            + head + attention + small operations
            + (reads' own processor time + what was read / B_checksum) / threads
    T_step  = (T_cpu ^ 3 + T_disk ^ 3) ^ (1 / 3) + experts' reads and checks

Reading overlaps computing, but reads are made and checked by threads on the same cores, as all of
whose work T_cpu is counted. What overlaps is not the longer one alone: both come in bursts, and
meet in one memory, so that near to each other they take a quarter more than either; far from each
other hardly more than the longer one. The exponent is fitted to measured steps (`JOIN`).
Expanding and multiplying share the cores and do not overlap. With the direct product, up to eight
rows, a unit costs p / B_product instead, and a little more for each further row, unless expanding
is faster even so; and with many rows products may be in float32: `endor.planning.products` has both
choices.
Which experts a token needs, and which neurons of a matrix stored by neuron, is known only when it
needs them, so nothing hides the reads of experts and of parts.

On a CUDA device the host only moves bytes:

    T_link  = sum over units outside VRAM of  use * (p / B_h2d + t_copy)
    T_gpu   = sum of  use * ((p + w) / B_hbm, unless dense) + max(use * w / B_hbm, 2 r n / F)
            + head + attention + launches
    T_step  = max(T_link, T_disk, T_gpu) + t_sync

Up to eight rows, a device whose rates are known multiplies straight from the packed form where
that is faster (`endor.planning.device_rates`): then T_gpu has n / R instead of the unit's terms.
Keys and values that stay in host memory or on disk cross the link, or are read, once a step.

A unit of which the host multiplies a share s of the rows, where it lies, crosses the link with the
others only. The device waits for the host's part, copies go on meanwhile, and both read one memory:

    T_link   has (1 - s) * p of it
    T_gpu    has (1 - s) of it, and s * p / B_product + 2 * t_copy + half a piece of a copy's time
    T_memory = (bytes that the host multiplies + bytes that are copied) / B_read
    T_step   = max(T_link, T_disk, T_gpu, T_memory) + t_sync
"""

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import repeat
from operator import attrgetter
from typing import Literal

from endor.planning.constants import Disk, Machine
from endor.planning.kv import KVSetting
from endor.planning.products import (
    PRODUCT_ROWS,
    device_s,
    head_s,
    multiply_s,
    packed_rows,
    packed_s,
)
from endor.planning.shape import ModelShape
from endor.planning.tiers import COPY_PIECE_BYTES, Tier
from endor.planning.unit_cost import NEURONS_READ, UnitCost

Product = Literal["exact", "direct"]
"""`exact`: expand, then torch's product; `direct`: whichever is fastest of that, a product from the
packed form, and one in float32; see `endor.planning.products`."""

OPS_PER_LAYER = 200
"""What a decoder layer does besides its weights (norms, rotary embedding, attention, cache update,
the interpreter between them), in small operations."""
OPS_PER_UNIT = 8
"""What calling a layer with a packed weight costs besides the work, in small operations."""
LAUNCHES_PER_LAYER = 24
JOIN = 3.0
"""How reading and computing add up, as an exponent: 1 would be in turns, many the longer one."""
SYNC_S = 0.5e-3
"""The host samples a token and submits the next step."""


@dataclass(frozen=True, slots=True)
class Step:
    """A forward pass to be predicted.

    Attributes:
        batch: Sequences.
        tokens: New tokens per sequence.
        context: Tokens in the cache when it ends.
        product: How weights are multiplied.
        kv: Where keys and values are kept.
    """

    batch: int
    tokens: int
    context: int
    product: Product = "exact"
    kv: KVSetting = "device"

    @property
    def rows(self) -> int:
        return self.batch * self.tokens


@dataclass(frozen=True, slots=True)
class Prediction:
    """The predicted time of a step.

    Attributes:
        seconds: All of it.
        bound: The resource that takes longest: `disk`, `cpu`, `link`, `gpu`, `memory` (the host's,
            for products and copies at once), or `host`, for whose products a device waits most.
        resources: Seconds per resource; they overlap.
        parts: Seconds of what the processor or device does in turn; they add up to its resource.
        unhidden: Seconds that overlap nothing.
        disk_bytes: Bytes read from disk.
        link_bytes: Bytes copied to a device.
        host_bytes: Bytes that the host multiplies beside it.
    """

    seconds: float
    bound: str
    resources: Mapping[str, float]
    parts: Mapping[str, float]
    unhidden: float
    disk_bytes: float
    link_bytes: float = 0.0
    host_bytes: float = 0.0


@dataclass(slots=True)
class _Sums:
    """What a walk over the units adds up."""

    expand: float = 0.0
    multiply: float = 0.0
    disk_bytes: float = 0.0
    routed_bytes: float = 0.0
    part_bytes: float = 0.0
    part_s: float = 0.0
    link_bytes: float = 0.0
    copies: float = 0.0
    moved: float = 0.0
    calls: float = 0.0
    host_s: float = 0.0
    host_bytes: float = 0.0
    trips: float = 0.0


def predict(
    costs: Sequence[UnitCost],
    tiers: Mapping[str, Tier],
    machine: Machine,
    disk: Disk,
    shape: ModelShape,
    step: Step,
    *,
    host_shares: Mapping[str, float] | None = None,
    kept_bytes: Mapping[str, int] | None = None,
    kinds: Sequence[int] | None = None,
) -> Prediction:
    """Return the predicted time of `step` with the units placed as `tiers` says.

    The device computes when `machine` has a link; pass it without one to predict the processor.
    `host_shares` and `kept_bytes` are those of a `Placement`, `kinds` what `kinds_of(costs)` gives,
    where it is known.
    """
    on_device = machine.link is not None
    sums = _Sums()
    flops = (machine.link.gemm_gflops if machine.link else machine.gemm_gflops) * 1e9
    weight_gbps = machine.link.hbm_gbps if machine.link else machine.linear_gbps
    direct, shares, keeps = step.product == "direct", host_shares or {}, kept_bytes or {}
    beside = direct and step.rows <= PRODUCT_ROWS
    for unit, tier, share, kept, count in _alike(costs, tiers, shares, keeps, kinds):
        cost = unit.placed(tier)
        use = count * _use(cost, step)
        sums.calls += use
        # Of experts, each multiplies the rows that were routed to it.
        rows = max(1, round(step.rows * cost.use))
        if on_device:
            here = share if tier == "host" and beside else 0.0
            there = 1.0 - here
            if here:
                part = NEURONS_READ if cost.by_neuron else 1.0
                if kept and cost.activity is not None:  # busy neurons are expanded on the device
                    busy = kept / cost.packed_bytes
                    here = cost.activity.outside(rows, busy)
                    sums.moved += use * busy * (cost.packed_bytes + cost.dense_bytes)
                    sums.multiply += use * busy * cost.dense_bytes / weight_gbps / 1e9
                sums.host_s += use * here * packed_s(cost, rows)
                sums.host_bytes += use * here * part * cost.packed_bytes
                sums.trips += use
            moved = 0 if tier == "vram-dense" else use * (cost.packed_bytes + cost.dense_bytes)
            dense_s = cost.dense_bytes / weight_gbps / 1e9
            arithmetic = count * 2 * step.rows * cost.weights * cost.use / flops
            multiply = max(use * dense_s, arithmetic)
            straight = use * device_s(cost, rows) if moved and direct else math.inf
            if straight < moved / weight_gbps / 1e9 + multiply:
                moved, multiply = 0, straight
            sums.moved += there * moved
            sums.multiply += there * multiply
            if there and tier not in ("vram", "vram-dense"):
                sums.link_bytes += use * there * cost.packed_bytes
                sums.copies += use
        elif direct and tier != "dense" and rows <= packed_rows(cost, machine):
            sums.multiply += use * packed_s(cost, rows)
        else:
            sums.expand += 0.0 if tier == "dense" else use * cost.expand_s
            sums.multiply += use * multiply_s(cost, machine, rows, wide=direct)
        if tier == "disk":
            by_neuron = cost.by_neuron and beside and not on_device
            nbytes = cost.packed_bytes * (NEURONS_READ if by_neuron else 1.0)
            if by_neuron and cost.assumed is not None:
                share = kept / cost.packed_bytes
                nbytes, seconds = cost.assumed.reads(cost.packed_bytes, disk, rows, share)
                if nbytes < cost.packed_bytes:
                    sums.part_bytes += use * nbytes
                    sums.part_s += use * seconds
            sums.disk_bytes += use * nbytes
            sums.routed_bytes += 0.0 if cost.scheduled else use * cost.packed_bytes
    if machine.link is not None:
        return _on_device(sums, machine, disk, shape, step)
    return _on_cpu(sums, machine, disk, shape, step)


_without_name = attrgetter(*(item.name for item in fields(UnitCost) if item.name != "name"))


def kinds_of(costs: Sequence[UnitCost]) -> list[int]:
    """Return a number for each unit, the same for units that differ in nothing but their name."""
    seen: dict[object, int] = {}
    return [seen.setdefault(_without_name(cost), at) for at, cost in enumerate(costs)]


def _alike(
    costs: Sequence[UnitCost],
    tiers: Mapping[str, Tier],
    shares: Mapping[str, float],
    keeps: Mapping[str, int],
    kinds: Sequence[int] | None,
) -> Iterator[tuple[UnitCost, Tier, float, int, int]]:
    """Yield (one of them, tier, the host's share, bytes kept, how many) of units that are alike."""
    names = [cost.name for cost in costs]
    hosted = map(shares.get, names, repeat(1.0)) if shares else repeat(1.0)
    kept = map(keeps.get, names, repeat(0)) if keeps else repeat(0)
    found: Counter[tuple[int, Tier, float, int]] = Counter(
        zip(kinds or kinds_of(costs), map(tiers.__getitem__, names), hosted, kept, strict=False)
    )
    for (at, tier, share, nbytes), count in found.items():
        yield costs[at], tier, share, nbytes, count


def _on_cpu(sums: _Sums, machine: Machine, disk: Disk, shape: ModelShape, step: Step) -> Prediction:
    attention_flops = 2.0 * step.batch * step.tokens * step.context * shape.hidden * shape.layers
    kv_bytes = shape.kv_bytes_per_token * step.context * step.batch
    kv_read = kv_bytes if step.kv == "disk" else 0
    check_s = 1 / machine.checksum_gbps / 1e9 if machine.checksum_gbps else 0.0
    parts = {
        "expand": sums.expand,
        "multiply": sums.multiply,
        "head": head_s(
            machine,
            shape.head_bytes / (shape.itemsize or 2),
            step.batch,
            own=step.product == "direct",
        ),
        "attention": kv_bytes / machine.read_gbps / 1e9
        + attention_flops / machine.gemm_gflops / 1e9,
        "small operations": shape.layers * _layer_ops_s(machine, shape, step)
        + sums.calls * OPS_PER_UNIT * machine.op_us / 1e6,
        "reads' own": sums.disk_bytes * disk.cpu_s_per_gb / 1e9 / machine.threads,
        "checks": sums.disk_bytes * check_s / machine.threads,
    }
    unhidden = sums.routed_bytes * (1 / disk.read_gbps / 1e9 + check_s) + sums.part_s
    ahead = sums.disk_bytes - sums.routed_bytes - sums.part_bytes
    resources = {
        "cpu": sum(parts.values()),
        "disk": (ahead + kv_read) / disk.read_gbps / 1e9,
    }
    bound = max(resources, key=lambda name: resources[name])
    seconds = joined(resources.values()) + unhidden
    if unhidden > resources[bound]:
        bound = "disk"
    return Prediction(seconds, bound, resources, parts, unhidden, sums.disk_bytes)


def joined(seconds: Iterable[float]) -> float:
    """Return the seconds of what goes on at once, in bursts, and shares cores and memory."""
    times = list(seconds)
    longest = max(times)
    if not longest:
        return 0.0
    return float(longest * math.fsum((each / longest) ** JOIN for each in times) ** (1 / JOIN))


def _on_device(
    sums: _Sums, machine: Machine, disk: Disk, shape: ModelShape, step: Step
) -> Prediction:
    link = machine.link
    assert link is not None
    kv_bytes = shape.kv_bytes_per_token * step.context * step.batch
    # Keys and values that stay elsewhere come over the same roads as weights.
    kv_copied = 0 if step.kv == "device" else kv_bytes
    kv_read = kv_bytes if step.kv == "disk" else 0
    attention_flops = 2.0 * step.batch * step.tokens * step.context * shape.hidden * shape.layers
    parts = {
        "expand": sums.moved / link.hbm_gbps / 1e9,
        "multiply": sums.multiply,
        "head": shape.head_bytes / link.hbm_gbps / 1e9,
        "attention": kv_bytes / link.hbm_gbps / 1e9 + attention_flops / link.gemm_gflops / 1e9,
        "launches": shape.layers * LAUNCHES_PER_LAYER * link.launch_us / 1e6,
    }
    if sums.trips:
        parts["host products"] = sums.host_s
        copied = sums.link_bytes / sums.copies if sums.copies else 0.0
        waits = min(copied, COPY_PIECE_BYTES) / 2 / link.h2d_gbps / 1e9
        parts["round trips"] = sums.trips * (2 * link.copy_us / 1e6 + waits)
    resources = {
        "gpu": sum(parts.values()),
        "link": (sums.link_bytes + kv_copied) / link.h2d_gbps / 1e9
        + sums.copies * link.copy_us / 1e6,
        "disk": (sums.disk_bytes + kv_read) / disk.read_gbps / 1e9,
    }
    if sums.trips:
        resources["memory"] = (sums.host_bytes + sums.link_bytes) / machine.read_gbps / 1e9
    longest = max(resources, key=lambda name: resources[name])
    on_host = longest == "gpu" and 2 * sums.host_s > resources["gpu"]
    return Prediction(
        resources[longest] + SYNC_S,
        "host" if on_host else longest,
        resources,
        parts,
        SYNC_S,
        sums.disk_bytes,
        sums.link_bytes,
        sums.host_bytes,
    )


def _use(cost: UnitCost, step: Step) -> float:
    """Share of such steps that need the unit: with many rows, some row needs each expert."""
    return 1.0 - (1.0 - cost.use) ** step.rows if cost.use < 1 else 1.0


def _layer_ops_s(machine: Machine, shape: ModelShape, step: Step) -> float:
    """Seconds of a layer's small operations: a fixed cost each, then memory traffic per row."""
    traffic = step.rows * shape.activation_bytes_per_token * 3
    return OPS_PER_LAYER * machine.op_us / 1e6 + traffic / machine.copy_gbps / 1e9
