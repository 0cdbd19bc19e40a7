"""What a generation did, from the ledger: shares of time, bytes per step, the last timeline."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from statistics import median
from typing import Any

from endor.offload.ledger import Event
from endor.offload.store import Store

COMPUTE = ("expand", "product", "host product")
KEYS = "keys and values"
"""What names of events about the cache begin with."""

TIMELINE_STEPS = 2
TIMELINE_EVENTS = 6000


@dataclass(frozen=True, slots=True)
class UnitRow:
    """One unit or weight in the report.

    Attributes:
        name: The unit, or the weight when the two are called differently.
        tier: Where it lives; empty for a weight.
        nbytes: Packed bytes.
        reads: Times it was read.
        read_ms: Median read.
        compute_ms: Median expansion or product.
        stall_ms: Time that forwards waited for it, in all.
    """

    name: str
    tier: str
    nbytes: int
    reads: int
    read_ms: float
    compute_ms: float
    stall_ms: float


@dataclass(frozen=True, slots=True)
class Summary:
    """A generation in figures; every one is from the ledger.

    Attributes:
        seconds: Wall time covered.
        steps: Seconds of each step, the prompt first; from one use of the first weight to the next.
        read_bytes: Bytes read from disk.
        bytes_per_step: The same per decode step.
        disk_share: Part of the time in which at least one read was on its way.
        disk_gbps: Read rate while that was so.
        expand_share: Part of the time spent in expansions and packed products.
        stall_share: Part of the time in which the model waited for a unit.
        rest_share: What remains: torch's products, attention, norms, sampling.
        counters: The ledger's totals.
        tiers: Units and bytes per tier.
        units: One row per unit.
    """

    seconds: float
    steps: tuple[float, ...]
    read_bytes: int
    bytes_per_step: float
    disk_share: float
    disk_gbps: float
    expand_share: float
    stall_share: float
    rest_share: float
    counters: Mapping[str, Any]
    tiers: Mapping[str, Any]
    units: tuple[UnitRow, ...]

    @property
    def decode_s(self) -> float:
        """Median decode step: all but the first; 0 when there was none."""
        return median(self.steps[1:]) if len(self.steps) > 1 else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Return the figures as plain data."""
        return asdict(self) | {"decode_s": self.decode_s}


def summarise(store: Store, seconds: tuple[float, float]) -> Summary:
    """Return what `store` did between two moments of `time.perf_counter`."""
    begin, end = seconds
    events = within(store.ledger.events, begin, end)
    report = store.report()
    wall = max(end - begin, 1e-9)
    reads = [event for event in events if event.kind == "read"]
    read_bytes = sum(event.nbytes for event in reads)
    busy = covered(reads)
    stalls = [event for event in events if event.kind == "stall"]
    stalled = covered(stalls)
    # An expansion that waits for its unit has the wait inside it.
    within_expansions = covered([event for event in stalls if not event.name.startswith(KEYS)])
    expanding = covered([event for event in events if event.kind in COMPUTE])
    computing = max(0.0, expanding - within_expansions)
    steps = step_times(events, end)
    marks = _step_marks(events)
    decode_bytes = sum(e.nbytes for e in reads if len(marks) > 1 and e.start_s >= marks[1])
    return Summary(
        seconds=wall,
        steps=tuple(steps),
        read_bytes=read_bytes,
        bytes_per_step=decode_bytes / (len(marks) - 1) if len(marks) > 1 else float(read_bytes),
        disk_share=busy / wall,
        disk_gbps=read_bytes / busy / 1e9 if busy else 0.0,
        expand_share=computing / wall,
        stall_share=stalled / wall,
        rest_share=max(0.0, 1 - (computing + stalled) / wall),
        counters=report["counters"],
        tiers=report["tiers"],
        units=tuple(_rows(store, events)),
    )


def within(events: Sequence[Event], begin: float, end: float) -> list[Event]:
    """Return the events that touch the interval, in order of their beginning."""
    inside = [event for event in events if event.stop_s >= begin and event.start_s <= end]
    return sorted(inside, key=lambda event: event.start_s)


def covered(events: Sequence[Event]) -> float:
    """Return the seconds in which at least one of the events was going on."""
    total, reached = 0.0, float("-inf")
    for event in sorted(events, key=lambda event: event.start_s):
        if event.stop_s > reached:
            total += event.stop_s - max(event.start_s, reached)
            reached = event.stop_s
    return total


def _step_marks(events: Sequence[Event]) -> list[float]:
    """Return when each step began: the moments at which the first weight was used."""
    computing = [event for event in events if event.kind in COMPUTE]
    if not computing:
        return []
    first = computing[0].name
    return [event.start_s for event in computing if event.name == first]


def step_times(events: Sequence[Event], end: float) -> list[float]:
    """Return the length of each step; the last one lasts until `end`."""
    marks = [*_step_marks(events), end]
    return [stop - start for start, stop in pairwise(marks)]


def timeline(events: Sequence[Event], steps: int = TIMELINE_STEPS) -> list[Event]:
    """Return the events of the last whole steps, as many as a page can show."""
    marks = _step_marks(events)
    if not marks:
        return list(events[-TIMELINE_EVENTS:])
    begin = marks[max(0, len(marks) - 1 - steps)]
    end = marks[-1] if len(marks) > 1 else float("inf")
    return within(events, begin, end)[:TIMELINE_EVENTS]


def _rows(store: Store, events: Sequence[Event]) -> list[UnitRow]:
    by_name: dict[str, dict[str, list[Event]]] = {}
    for event in events:
        by_name.setdefault(event.name, {}).setdefault(event.kind, []).append(event)
    weights = {
        unit.name: [name for name, weight in store.weights.items() if _uses(weight, unit.name)]
        for unit in store.units
    }
    rows = []
    for unit in store.units:
        own = by_name.get(unit.name, {})
        reads = [_ms(event) for event in own.get("read", [])]
        times = [
            _ms(event)
            for name in weights[unit.name]
            for kind in COMPUTE
            for event in by_name.get(name, {}).get(kind, [])
        ]
        rows.append(
            UnitRow(
                name=unit.name,
                tier=store.placement.tiers[unit.name],
                nbytes=unit.nbytes,
                reads=len(reads),
                read_ms=median(reads) if reads else 0.0,
                compute_ms=median(times) if times else 0.0,
                stall_ms=sum(_ms(event) for event in own.get("stall", [])),
            )
        )
    return rows


def _uses(weight: Any, unit: str) -> bool:
    return any(state.unit.name == unit for state in weight.states)


def _ms(event: Event) -> float:
    return 1e3 * (event.stop_s - event.start_s)
