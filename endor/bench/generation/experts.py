"""How often a cache of experts has what routers choose: a real trace, and policies run over it."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, Protocol

import numpy as np
import torch

from endor.errors import ConfigError
from endor.hf.routing import Router, routers
from endor.offload.experts import Popularity

WINDOW = 512
"""Tokens of one forward when a trace is recorded."""

PolicyName = Literal["lru", "lfu", "static", "endor", "belady"]
POLICIES: dict[PolicyName, str] = {
    "lru": "least recently used gives way",
    "lfu": "least often used since the start gives way",
    "static": "the experts used most in the first half of the trace stay",
    "endor": "uses fade with age (endor.offload.experts)",
    "belady": "oracle: the one used again last gives way (Belady 1966)",
}


@dataclass(frozen=True, slots=True)
class RoutingTrace:
    """Which experts each token was routed to, and which ones were guessed before.

    Attributes:
        names: Name of each layer's block, in execution order.
        experts: Experts per layer.
        chosen: `(tokens, layers, top_k)`, int64.
        guessed: The same, from the layer before; -1 where there is none.
    """

    names: tuple[str, ...]
    experts: int
    chosen: np.ndarray
    guessed: np.ndarray

    @property
    def total(self) -> int:
        """Experts of all layers."""
        return len(self.names) * self.experts

    @property
    def accuracy(self) -> float:
        """Share of the chosen experts that were guessed, over layers that have a guess."""
        there = self.guessed[:, :, :1] >= 0
        right = (self.chosen[..., None] == self.guessed[..., None, :]).any(-1)
        return float((right & there).sum() / np.broadcast_to(there, right.shape).sum())

    def skew(self, share: float = 0.25) -> float:
        """Return the part of all uses that a layer's most used `share` of experts gets."""
        top = max(1, round(share * self.experts))
        counts = [
            np.sort(np.bincount(self.chosen[:, layer].ravel(), minlength=self.experts))[-top:].sum()
            for layer in range(len(self.names))
        ]
        return float(sum(counts) / self.chosen.size)


def record_routing(model: Any, ids: torch.Tensor) -> RoutingTrace:
    """Return the routing of a text, token by token.

    The text is known beforehand, so whole windows run at once: each token is routed as it would be
    if the model had written the text one token at a time.

    Args:
        model: A transformers model with fused experts, packed or not.
        ids: Tokens, 1-D.

    Raises:
        ConfigError: The model has no routers that Endor knows how to ask.
    """
    found = list(routers(model))
    if not found:
        raise ConfigError("the model has no routed experts; give a mixture of experts")
    chosen: list[list[torch.Tensor]] = [[] for _ in found]
    guessed: list[list[torch.Tensor]] = [[] for _ in found]

    def watch(at: int, following: Router | None) -> Callable[..., None]:
        def hook(module: Any, args: tuple[Any, ...]) -> None:
            chosen[at].append(args[1])
            if following is not None:
                guessed[at + 1].append(following.choose(args[0]))

        return hook

    handles = [
        router.experts.register_forward_pre_hook(watch(at, following))
        for at, (router, following) in enumerate(pairwise([*found, None]))
        if router is not None
    ]
    try:
        with torch.no_grad():
            for window in torch.split(ids, WINDOW):
                model(window[None].to(model.device))
    finally:
        for handle in handles:
            handle.remove()
    stack = torch.stack([torch.cat(parts) for parts in chosen], dim=1)
    guesses = [torch.cat(parts) if parts else torch.full_like(stack[:, 0], -1) for parts in guessed]
    return RoutingTrace(
        names=tuple(router.name for router in found),
        experts=len(found[0].module.weight),  # type: ignore[arg-type]
        chosen=stack.cpu().numpy(),
        guessed=torch.stack(guesses, dim=1).cpu().numpy(),
    )


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a cache did over the second half of a trace.

    Attributes:
        policy: Which expert gave way.
        capacity: Experts that the cache holds.
        prefetch: Whether the guesses for the next layer were read.
        tokens: Tokens counted.
        uses: Experts chosen.
        hits: Of these, in the cache.
        reads: Experts read.
        guessed_reads: Of these, because of a guess.
        wasted: Of these, given up unused.
    """

    policy: PolicyName
    capacity: int
    prefetch: bool
    tokens: int
    uses: int
    hits: int
    reads: int
    guessed_reads: int
    wasted: int

    @property
    def hit_rate(self) -> float:
        return self.hits / self.uses

    @property
    def reads_per_token(self) -> float:
        return self.reads / self.tokens


class Policy(Protocol):
    """Values experts, numbered over all layers: of the cached ones the least valued gives way."""

    values: np.ndarray

    def use(self, layer: int, experts: Sequence[int], at: int) -> None:
        """Note that a layer, the `at`-th in the trace, uses experts."""


class _Lru:
    def __init__(self, trace: RoutingTrace) -> None:
        self.values = np.full(trace.total, -1.0)

    def use(self, layer: int, experts: Sequence[int], at: int) -> None:
        self.values[list(experts)] = at


class _Lfu(_Lru):
    def use(self, layer: int, experts: Sequence[int], at: int) -> None:
        self.values[list(experts)] += 1


class _Static(_Lru):
    def __init__(self, trace: RoutingTrace) -> None:
        used = _numbered(trace, trace.chosen[: len(trace.chosen) // 2])
        self.values = np.bincount(used.ravel(), minlength=trace.total).astype(float)

    def use(self, layer: int, experts: Sequence[int], at: int) -> None:
        pass


class _Endor(_Lru):
    def __init__(self, trace: RoutingTrace, half_life: float | None = None) -> None:
        super().__init__(trace)
        self.values -= np.inf
        self._popularity = Popularity(half_life) if half_life else Popularity()

    def use(self, layer: int, experts: Sequence[int], at: int) -> None:
        self._popularity.observe(layer, experts)
        for expert in experts:
            self.values[expert] = self._popularity.value(expert)


class _Belady(_Lru):
    def __init__(self, trace: RoutingTrace) -> None:
        self.values = np.full(trace.total, -np.inf)
        self._later: list[list[int]] = [[] for _ in range(trace.total)]
        numbered = _numbered(trace, trace.chosen).reshape(-1, trace.chosen.shape[2])
        for at in range(len(numbered) - 1, -1, -1):
            for expert in set(numbered[at].tolist()):
                self._later[expert].append(at)
        for expert, later in enumerate(self._later):
            if later:
                self.values[expert] = -later[-1]

    def use(self, layer: int, experts: Sequence[int], at: int) -> None:
        for expert in experts:
            later = self._later[expert]
            later.pop()
            self.values[expert] = -later[-1] if later else -np.inf


def policy(name: PolicyName, trace: RoutingTrace, half_life: float | None = None) -> Policy:
    """Return a policy at the start of a trace; `half_life` is for `endor`."""
    if name == "endor":
        return _Endor(trace, half_life)
    return {"lru": _Lru, "lfu": _Lfu, "static": _Static, "belady": _Belady}[name](trace)


def simulate(
    trace: RoutingTrace,
    name: PolicyName,
    capacity: int,
    *,
    prefetch: bool = False,
    half_life: float | None = None,
) -> Outcome:
    """Run a cache over a trace as the engine does, one token at a time.

    A layer's experts stay until the next layer has run. Guesses for the next layer are read at
    once and displace anything but these and each other. Reads take no time: an engine may find a
    guess still on its way.

    Args:
        trace: What was used.
        name: Which expert gives way.
        capacity: Experts that the cache holds, at least those that a layer uses.
        prefetch: Read the guesses for the next layer.
        half_life: For `endor`.

    Raises:
        ConfigError: The capacity is too small.
    """
    tokens, layers, top_k = trace.chosen.shape
    if capacity < top_k:
        raise ConfigError(
            f"a cache must hold the {top_k} experts of one layer and token, got {capacity}"
        )
    chooser = policy(name, trace, half_life)
    cached, warm = np.zeros(trace.total, bool), np.zeros(trace.total, bool)
    half = tokens // 2
    uses = hits = reads = guessed_reads = wasted = filled = 0

    def insert(expert: int, kept: list[int]) -> bool:
        nonlocal filled, wasted
        if filled == capacity:
            movable = cached.copy()
            movable[kept] = False
            if not movable.any():
                return False
            candidates = np.flatnonzero(movable)
            victim = candidates[chooser.values[candidates].argmin()]
            cached[victim] = False
            wasted += bool(warm[victim]) and counted
            warm[victim] = False
        else:
            filled += 1
        cached[expert] = True
        return True

    for token in range(tokens):
        counted = token >= half
        for layer in range(layers):
            chosen = _unique(trace.chosen[token, layer], layer * trace.experts)
            chooser.use(layer, chosen, token * layers + layer)
            for expert in chosen:
                uses += counted
                if cached[expert]:
                    hits += counted
                else:
                    insert(expert, chosen)
                    reads += counted
                warm[expert] = False
            if not prefetch or layer + 1 == layers or trace.guessed[token, layer + 1, 0] < 0:
                continue
            guesses = _unique(trace.guessed[token, layer + 1], (layer + 1) * trace.experts)
            for expert in guesses:
                if cached[expert]:
                    continue
                if not insert(expert, chosen + guesses):
                    break
                warm[expert] = True
                reads += counted
                guessed_reads += counted
    return Outcome(
        name, capacity, prefetch, tokens - half, uses, hits, reads, guessed_reads, wasted
    )


def compare(trace: RoutingTrace, shares: Sequence[float]) -> Iterator[Outcome]:
    """Yield every policy's outcome at caches of these shares of all experts."""
    least = 3 * trace.chosen.shape[2]
    for share in shares:
        capacity = max(least, round(share * trace.total))
        for prefetch in (False, True):
            for name in POLICIES:
                yield simulate(trace, name, capacity, prefetch=prefetch)


def table(trace: RoutingTrace, outcomes: Sequence[Outcome]) -> str:
    """Return the outcomes as a Markdown table: hit rate, and experts read per token."""
    lines = [
        "| cache | prefetch | " + " | ".join(POLICIES) + " |",
        "|---|---|" + "---|" * len(POLICIES),
    ]
    rows: dict[tuple[int, bool], dict[str, Outcome]] = {}
    for outcome in outcomes:
        rows.setdefault((outcome.capacity, outcome.prefetch), {})[outcome.policy] = outcome
    for (capacity, prefetch), row in rows.items():
        cells = [f"{row[p].hit_rate:.1%} ({row[p].reads_per_token:.1f})" for p in POLICIES]
        head = f"{capacity} of {trace.total}"
        lines.append(f"| {head} | {'yes' if prefetch else 'no'} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _numbered(trace: RoutingTrace, chosen: np.ndarray) -> np.ndarray:
    """Return experts numbered over all layers."""
    return chosen + trace.experts * np.arange(chosen.shape[1])[:, None]


def _unique(experts: np.ndarray, offset: int) -> list[int]:
    return [expert + offset for expert in dict.fromkeys(experts.tolist())]
