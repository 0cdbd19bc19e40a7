"""The ledger's timeline in Chrome's trace form, for Perfetto and chrome://tracing."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from endor.bench.timeline import within
from endor.offload.ledger import Event
from endor.offload.store import Store

DOING = {"read": "reads", "check": "checks", "copy": "copies"}
"""What the row of a thread is called after, by the first event on it that is no wait."""


def trace(events: Sequence[Event]) -> dict[str, Any]:
    """Return complete events (`ph` X) in microseconds from the first, a row per thread."""
    begin = min((event.start_s for event in events), default=0.0)
    rows: dict[int, int] = {}
    # Whoever waits for a unit says nothing of what its thread is for.
    does = {event.thread: event.kind for event in reversed(events) if event.kind != "stall"}
    out: list[dict[str, Any]] = []
    for event in events:
        if event.thread not in rows:
            rows[event.thread] = len(rows)
            doing = DOING.get(does.get(event.thread, ""), "computes")
            named = {"name": f"{doing} {len(rows)}"}
            row = rows[event.thread]
            out.append({"ph": "M", "name": "thread_name", "pid": 1, "tid": row, "args": named})
        out.append(
            {
                "ph": "X",
                "name": event.name,
                "cat": event.kind,
                "pid": 1,
                "tid": rows[event.thread],
                "ts": (event.start_s - begin) * 1e6,
                "dur": (event.stop_s - event.start_s) * 1e6,
                "args": {"kind": event.kind, "nbytes": event.nbytes},
            }
        )
    return {"traceEvents": out, "displayTimeUnit": "ms"}


def write_trace(path: Path, store: Store, *, seconds: tuple[float, float]) -> None:
    """Write all events of a generation.

    Args:
        path: The JSON file; replaced.
        store: The model's store (`model.endor`).
        seconds: When the generation began and ended, on the clock of `time.perf_counter`.
    """
    events = within(store.ledger.events, *seconds)
    path.write_text(json.dumps(trace(events)), encoding="utf-8")
