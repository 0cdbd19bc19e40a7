"""What a server counts, in the text form of Prometheus."""

import time
from collections.abc import Callable, Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest
from prometheus_client.core import CounterMetricFamily

MOVED = {
    "read_bytes": "Bytes read from disk.",
    "packed_bytes": "Packed bytes of the weights that were expanded or multiplied by.",
}
"""Counters of the store's ledger that are shown."""


class Metrics:
    """The counters of one server; also counts what its model generates.

    Args:
        store: The model's store of packed weights; None for an ordinary model.
    """

    def __init__(self, store: Any = None) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "endor_requests", "Requests answered.", ["route", "status"], registry=self.registry
        )
        self.waiting = Gauge(
            "endor_requests_open", "Requests that wait or are answered.", registry=self.registry
        )
        self.prompt = Counter("endor_prompt_tokens", "Tokens of prompts.", registry=self.registry)
        self.generated = Counter("endor_generated_tokens", "Tokens made.", registry=self.registry)
        self.seconds = Counter(
            "endor_generation_seconds", "Time spent generating.", registry=self.registry
        )
        self.rate = Gauge(
            "endor_tokens_per_second",
            "Of the last answer, from its prompt on.",
            registry=self.registry,
        )
        self._store = store
        if store is not None:
            self.registry.register(self)

    def collect(self) -> Iterator[CounterMetricFamily]:
        """Yield what the store moved."""
        counters = self._store.report()["counters"]
        for name, what in MOVED.items():
            yield CounterMetricFamily(f"endor_{name}", what, value=float(counters[name]))

    def counted(self, generate: Callable[..., Any]) -> Callable[..., Any]:
        """Return a model's `generate` that counts its tokens and time.

        A stream that its client left counts what it had made.
        """

        def run(*arguments: Any, **options: Any) -> Any:
            prompt = options["input_ids"].shape[-1]
            streamer = options.get("streamer")
            start, made = time.perf_counter(), -1
            try:
                out = generate(*arguments, **options)
                made = out.shape[-1] - prompt
                return out
            finally:
                seconds = time.perf_counter() - start
                if made < 0:
                    made = getattr(streamer, "total_tokens", 0)
                self.prompt.inc(prompt)
                self.generated.inc(made)
                self.seconds.inc(seconds)
                self.rate.set(made / seconds if seconds else 0.0)

        return run

    def text(self) -> bytes:
        """Return all of it as Prometheus reads it."""
        text: bytes = generate_latest(self.registry)
        return text
