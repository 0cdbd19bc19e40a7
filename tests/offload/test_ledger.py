"""Counters grow, events are kept in a ring, both can be read while they are written."""

import pytest

from endor.offload import Ledger


def test_since_counts_from_a_snapshot():
    ledger = Ledger()
    ledger.counters.reads += 2
    before = ledger.snapshot()
    ledger.counters.reads += 3
    ledger.counters.read_s += 0.5
    grown = ledger.since(before)
    assert (grown["reads"], grown["read_s"], grown["misses"]) == (3, 0.5, 0)


def test_old_events_make_room():
    ledger = Ledger(events=3)
    for at in range(5):
        ledger.note("read", f"u{at}", at, at + 0.5, 10 * at)
    assert [event.name for event in ledger.events] == ["u2", "u3", "u4"]
    last = ledger.events[-1]
    assert (last.kind, last.start_s, last.stop_s, last.nbytes) == ("read", 4, 4.5, 40)


def test_clear():
    ledger = Ledger()
    ledger.note("stall", "u", 0, 1, 2)
    ledger.counters.stall_s = 1.0
    counters = ledger.counters
    ledger.clear()
    assert ledger.events == []
    assert ledger.counters is counters, "the engine writes to the same object"
    assert counters.stall_s == 0


def test_counters_have_no_stray_fields():
    with pytest.raises(AttributeError):
        Ledger().counters.hitz = 1
