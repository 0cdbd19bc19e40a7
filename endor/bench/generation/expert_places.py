"""What experts cost a token by where they lie beside a device: a real trace, simulated time.

Every chosen expert costs what its place costs. Times are those of the planner, from
the constants of a machine; what experts do not cause (attention, norms, the head) is left out.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from endor.bench.generation.experts import PolicyName, RoutingTrace, policy
from endor.errors import ConfigError
from endor.offload.experts import HALF_LIFE, Popularity, best_exchange, expected_uses
from endor.planning.exchanges import STEP_SHARE, Times
from endor.planning.machine import Machine
from endor.planning.unit_cost import UnitCost

WayName = Literal["host", "layers", "lru", "lfu", "belady", "endor", "known"]
WAYS: dict[WayName, str] = {
    "host": "all experts in host memory, multiplied there",
    "layers": "all experts of some layers in VRAM, the others multiplied on the host",
    "lru": "what is not in VRAM is copied there for its use; least recently used gives way",
    "lfu": "the same; least often used gives way",
    "belady": "the same; oracle: the one used again last gives way",
    "endor": "multiplied where it lies; exchanged between tokens where that pays",
    "known": "the same; oracle: the uses of the coming window are known",
}
COPYING: dict[WayName, PolicyName] = {"lru": "lru", "lfu": "lfu", "belady": "belady"}
WINDOW = round(HALF_LIFE / np.log(2))
"""Visits in which a use fades on average: what `known` knows of the future."""


@dataclass(frozen=True, slots=True)
class Cost:
    """What a way to place experts costs, over the second half of a trace.

    Attributes:
        way: How they are placed.
        capacity: Experts that VRAM holds.
        token_s: Seconds a token spends with experts.
        hit_rate: Share of the chosen experts that were in VRAM.
        link_bytes: Bytes copied to VRAM a token.
    """

    way: WayName
    capacity: int
    token_s: float
    hit_rate: float
    link_bytes: float


def cost(
    trace: RoutingTrace,
    way: WayName,
    capacity: int,
    expert: UnitCost,
    machine: Machine,
    *,
    device_rate: float | None = None,
) -> Cost:
    """Return what experts cost a token.

    Args:
        trace: What was used.
        way: How experts are placed.
        capacity: Experts that VRAM holds; at least those that a layer uses.
        expert: One expert, all of one size.
        machine: The machine, with a link.
        device_rate: How many times as fast as a dense product the device multiplies from the packed
            form; None where it expands first, as the planner assumes.

    Raises:
        ConfigError: The capacity is too small, or the machine has no device.
    """
    tokens, layers, top_k = trace.chosen.shape
    if machine.link is None or capacity < top_k:
        raise ConfigError(
            f"experts in VRAM: a machine with a device and a place for {top_k} experts are needed, "
            f"got {capacity} places"
        )
    times, nbytes = Times.of(expert, machine, 1), expert.packed_bytes
    if device_rate is not None:
        here = expert.dense_bytes / machine.link.hbm_gbps / 1e9 / device_rate
        times = replace(times, here=here)
    memory_s = nbytes / machine.read_gbps / 1e9
    place = _places(trace, way, capacity, times)
    half, spent, hits, copies = tokens // 2, 0.0, 0, 0
    for token in range(tokens):
        hit = moved = 0
        for layer in range(layers):
            found, copied = place.use(token, layer)
            hit, moved = hit + found, moved + copied
        outside = layers * top_k - hit
        copying = way in COPYING
        seconds = hit * times.here + outside * (times.copy + times.here if copying else times.host)
        # Both products of the host and copies read its memory.
        read = moved if copying else outside
        background = 0 if copying else place.exchange(token, seconds, nbytes, machine)
        seconds = max(seconds, (read + background) * memory_s)
        if token >= half:
            spent, hits, copies = spent + seconds, hits + hit, copies + moved + background
    counted = tokens - half
    return Cost(
        way,
        capacity if way != "host" else 0,
        spent / counted,
        hits / (counted * layers * top_k),
        copies * nbytes / counted,
    )


class _Fixed:
    """Experts that stay where they are; `there` of them in VRAM."""

    def __init__(self, trace: RoutingTrace, there: np.ndarray) -> None:
        self.trace, self.there = trace, there

    def use(self, token: int, layer: int) -> tuple[int, int]:
        """Return how many of the chosen experts are in VRAM, and how many are copied now."""
        return int(self.there[self.chosen(token, layer)].sum()), 0

    def chosen(self, token: int, layer: int) -> np.ndarray:
        """Return the chosen experts, numbered over all layers."""
        found: np.ndarray = self.trace.chosen[token, layer] + layer * self.trace.experts
        return found

    def exchange(self, token: int, seconds: float, nbytes: int, machine: Machine) -> int:
        """Return how many experts are copied during a token, for the next one."""
        return 0


class _Copied(_Fixed):
    """A cache into which everything is copied for its use."""

    def __init__(self, trace: RoutingTrace, capacity: int, name: PolicyName) -> None:
        super().__init__(trace, np.zeros(trace.total, bool))
        self.policy, self.capacity = policy(name, trace), capacity

    def use(self, token: int, layer: int) -> tuple[int, int]:
        chosen = self.chosen(token, layer)
        self.policy.use(layer, chosen.tolist(), token * len(self.trace.names) + layer)
        found = int(self.there[chosen].sum())
        for expert in chosen[~self.there[chosen]]:
            if self.there.sum() == self.capacity:
                movable = self.there.copy()
                movable[chosen] = False
                candidates = np.flatnonzero(movable)
                self.there[candidates[self.policy.values[candidates].argmin()]] = False
            self.there[expert] = True
        return found, len(chosen) - found


class _Exchanged(_Fixed):
    """Experts that are exchanged between tokens, by uses that fade or by those that come."""

    def __init__(self, trace: RoutingTrace, there: np.ndarray, gain: float, *, known: bool) -> None:
        super().__init__(trace, there)
        self.gain, self.known = gain, known
        self.popularity = Popularity()
        self.values = np.full(trace.total, -np.inf)
        self.allowance = 0.0

    def use(self, token: int, layer: int) -> tuple[int, int]:
        chosen = self.chosen(token, layer).tolist()
        self.popularity.observe(layer, chosen)
        self.values[chosen] = [self.popularity.value(expert) for expert in chosen]
        return super().use(token, layer)

    def exchange(self, token: int, seconds: float, nbytes: int, machine: Machine) -> int:
        assert machine.link is not None
        limit = STEP_SHARE * seconds * machine.link.h2d_gbps * 1e9
        self.allowance = min(self.allowance + limit, max(limit, nbytes))
        uses, moved = self._uses(token), 0
        while self.allowance >= nbytes:
            outside, inside = np.flatnonzero(~self.there), np.flatnonzero(self.there)
            found = best_exchange(uses, outside, inside, self.gain)
            if found is None:
                break
            self.there[found[0]], self.there[found[1]] = True, False
            self.allowance -= nbytes
            moved += 1
        return moved

    def _uses(self, token: int) -> np.ndarray:
        if not self.known:
            visits = np.full(len(self.values), token + 1)
            return expected_uses(self.values, visits, self.popularity.half_life)
        coming = self.trace.chosen[token + 1 : token + 1 + WINDOW]
        numbered = coming + self.trace.experts * np.arange(coming.shape[1])[:, None]
        return np.bincount(numbered.ravel(), minlength=self.trace.total).astype(float)


def _places(trace: RoutingTrace, way: WayName, capacity: int, times: Times) -> _Fixed:
    layers, there = len(trace.names), np.zeros(trace.total, bool)
    if way in COPYING:
        return _Copied(trace, capacity, COPYING[way])
    if way == "layers":
        whole = np.linspace(0, layers, capacity // trace.experts, endpoint=False).astype(int)
        there.reshape(layers, trace.experts)[whole] = True
    elif way != "host":
        there[np.linspace(0, trace.total, capacity, endpoint=False).astype(int)] = True
        return _Exchanged(trace, there, times.gain(1.0), known=way == "known")
    return _Fixed(trace, there)


def compare_places(
    trace: RoutingTrace,
    shares: Sequence[float],
    expert: UnitCost,
    machine: Machine,
    *,
    device_rate: float | None = None,
) -> Iterator[Cost]:
    """Yield what every way costs with VRAM for these shares of all experts."""
    for share in shares:
        for way in WAYS:
            capacity = round(share * trace.total)
            yield cost(trace, way, capacity, expert, machine, device_rate=device_rate)


def places_table(trace: RoutingTrace, costs: Sequence[Cost]) -> str:
    """Return costs as a Markdown table: a row a way, per share of VRAM three figures."""
    capacities = sorted({each.capacity for each in costs if each.way != "host"})
    heads = [f"{capacity} of {trace.total} in VRAM" for capacity in capacities]
    lines = [
        "| experts | " + " | ".join(heads) + " |",
        "|---|" + "---|" * len(heads),
    ]
    found = {(each.way, each.capacity): each for each in costs}
    for way in WAYS:
        cells = []
        for capacity in capacities:
            each = found[way, capacity if way != "host" else 0]
            cells.append(
                f"{each.token_s * 1e3:.1f} ms, {each.hit_rate:.0%}, {each.link_bytes / 1e6:.0f} MB"
            )
        lines.append(f"| `{way}` | " + " | ".join(cells) + " |")
    return "\n".join(lines)
