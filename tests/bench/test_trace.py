"""The trace holds the ledger's events, as Chrome's viewer takes them."""

import json

from endor.bench.trace import trace, write_trace

from .test_timeline import make_store


def test_every_event_on_its_threads_row(tmp_path):
    path = tmp_path / "trace.json"
    store = make_store()
    write_trace(path, store, seconds=(10.0, 13.0))
    events = json.loads(path.read_text())["traceEvents"]
    done = [event for event in events if event["ph"] == "X"]
    assert len(done) == len(list(store.ledger.events)) == 12
    first = done[0]
    assert (first["ts"], first["args"]["nbytes"]) == (0, 900)
    assert abs(first["dur"] - 2e5) < 1
    names = {event["tid"]: event["args"]["name"] for event in events if event["ph"] == "M"}
    assert sorted(names.values()) == ["computes 1", "reads 2"]
    assert all(names[event["tid"]] == "reads 2" for event in done if event["cat"] == "read")


def test_nothing_happened():
    assert trace([])["traceEvents"] == []
