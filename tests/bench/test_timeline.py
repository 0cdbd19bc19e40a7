"""The report's figures are the ledger's, and its page stands alone."""

import json
import re
from dataclasses import asdict
from types import SimpleNamespace
from xml.etree import ElementTree

import pytest

import endor
from endor.bench.records import environment
from endor.bench.timeline import covered, step_times, summarise, timeline, within
from endor.bench.timeline_page import write_report
from endor.offload.ledger import Counters, Ledger


def make_store(steps=3, *, name="a<b"):
    """Return a store whose ledger saw `steps` steps of one second over two units.

    Each step reads one unit for 0.4 s, waits 0.1 s of that, and expands for 0.3 s in all.
    """
    ledger = Ledger()
    units = [SimpleNamespace(name=name, nbytes=1000), SimpleNamespace(name="u2", nbytes=500)]
    states = [SimpleNamespace(unit=unit) for unit in units]
    for step in range(steps):
        at = 10.0 + step
        note(ledger, "expand", f"{name}.weight", at, at + 0.2, 900, thread=1)
        note(ledger, "stall", name, at, at + 0.1, 1000, thread=1)
        note(ledger, "expand", "w2", at + 0.5, at + 0.6, 400, thread=1)
        note(ledger, "read", name, at + 0.3, at + 0.7, 1000, thread=2)
    ledger.counters.hits = 2 * steps
    return SimpleNamespace(
        ledger=ledger,
        units=units,
        weights={
            f"{name}.weight": SimpleNamespace(states=states[:1]),
            "w2": SimpleNamespace(states=states[1:]),
        },
        placement=SimpleNamespace(tiers={name: "disk", "u2": "resident"}),
        report=lambda: {
            "counters": {"hits": ledger.counters.hits},
            "tiers": {
                "disk": {"units": 1, "nbytes": 1000},
                "resident": {"units": 1, "nbytes": 500},
            },
        },
    )


def note(ledger, kind, name, start, stop, nbytes, thread):
    ledger._events.append((kind, name, start, stop, nbytes, thread))


def test_shares_and_bytes():
    found = summarise(make_store(), (10.0, 13.0))
    assert found.steps == pytest.approx((1.0, 1.0, 1.0))
    assert found.decode_s == pytest.approx(1.0)
    assert found.read_bytes == 3000
    assert found.bytes_per_step == pytest.approx(1000)
    assert found.disk_share == pytest.approx(0.4)
    assert found.disk_gbps == pytest.approx(3000 / 1.2 / 1e9)
    assert found.stall_share == pytest.approx(0.1)
    assert found.expand_share == pytest.approx(0.2)
    assert found.rest_share == pytest.approx(0.7)


def test_units_carry_reads_waits_and_the_time_of_their_weights():
    first, second = summarise(make_store(), (10.0, 13.0)).units
    assert (first.tier, first.reads, second.tier, second.reads) == ("disk", 3, "resident", 0)
    assert first.read_ms == pytest.approx(400)
    assert first.stall_ms == pytest.approx(300)
    assert first.compute_ms == pytest.approx(200)
    assert second.compute_ms == pytest.approx(100)


def test_only_the_interval_counts():
    found = summarise(make_store(), (11.0, 12.0))
    assert found.seconds == pytest.approx(1.0)
    assert found.read_bytes == 1000


def test_overlapping_events_are_not_counted_twice():
    ledger = Ledger()
    for start, stop in [(0, 2), (1, 3), (1.5, 1.6), (5, 6)]:
        note(ledger, "read", "u", start, stop, 1, thread=1)
    assert covered(ledger.events) == pytest.approx(4)


def test_nothing_happened():
    store = make_store(0)
    found = summarise(store, (0.0, 1.0))
    assert (found.steps, found.decode_s, found.read_bytes) == ((), 0.0, 0)
    assert step_times([], 1.0) == []
    assert timeline([]) == []


def test_the_timeline_holds_the_last_whole_steps():
    events = within(make_store(6).ledger.events, 0.0, 99.0)
    shown = timeline(events, 2)
    assert shown[0].start_s == pytest.approx(13.0)
    assert shown[-1].start_s == pytest.approx(15.0)


def test_the_page_stands_alone(tmp_path):
    path = tmp_path / "report.html"
    write_report(
        path,
        make_store(),
        seconds=(10.0, 13.0),
        predicted={"decode_s": 0.8},
        title="model <1>",
    )
    text = path.read_text()
    assert "model &lt;1&gt;" in text
    assert "+25%" in text
    assert not re.search(r"(?:src|href)=", text)
    drawings = re.findall(r"<svg.*?</svg>", text, re.DOTALL)
    assert len(drawings) == 3
    for drawing in drawings:
        ElementTree.fromstring(drawing)
    assert "reader 1" in drawings[1]
    assert "model" in drawings[1]
    data = re.search(r'id="endor-report">(.*?)</script>', text, re.DOTALL)
    assert json.loads(data[1])["read_bytes"] == 3000


def test_the_page_says_what_it_was_made_under_and_fits_a_phone(tmp_path):
    path = tmp_path / "report.html"
    budget = {"vram": None, "ram": "2GiB<"}
    write_report(path, make_store(), seconds=(10.0, 13.0), budget=budget)
    text = path.read_text()
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in text
    assert "prefers-color-scheme: dark" in text
    assert "vram as found, ram 2GiB&lt;" in text
    place = environment()
    assert place.device in text
    assert f"endor {endor.__version__}" in text
    data = json.loads(re.search(r'id="endor-report">(.*?)</script>', text, re.DOTALL)[1])
    assert data["conditions"]["budget"] == "vram as found, ram 2GiB<"


def with_cache_events(store, steps=3):
    """Add a load and a save of keys and values to each step, and a wait outside any expansion."""
    for step in range(steps):
        at = 10.0 + step
        note(store.ledger, "stall", "keys and values 0", at + 0.7, at + 0.75, 0, thread=1)
        note(store.ledger, "kv load", "keys and values 1", at + 0.1, at + 0.2, 300, thread=2)
        note(store.ledger, "kv save", "keys and values 0", at + 0.8, at + 0.9, 100, thread=2)
    return store


def test_waits_for_keys_and_values_are_no_part_of_expansions():
    found = summarise(with_cache_events(make_store()), (10.0, 13.0))
    assert found.stall_share == pytest.approx(0.15)
    assert found.expand_share == pytest.approx(0.2)
    assert found.read_bytes == 3000


def test_keys_values_and_experts_are_shown_where_there_are_any(tmp_path):
    path = tmp_path / "report.html"
    plain = make_store()
    write_report(path, plain, seconds=(10.0, 13.0))
    for text in ("keys and values", "experts"):
        assert text not in re.sub(r"<script.*?</script>", "", path.read_text(), flags=re.DOTALL)
    store = with_cache_events(make_store())
    counters = asdict(Counters()) | {
        "kv_loads": 3,
        "kv_hits": 2,
        "kv_load_bytes": 2_000_000_000,
        "expert_uses": 8,
        "expert_hits": 6,
        "expert_late": 1,
        "hot_uses": 10,
        "hot_hits": 4,
        "exchanges": 7,
        "exchange_bytes": 3_000_000,
        "guessed_uses": 4,
        "right_guesses": 3,
        "warm_reads": 5,
        "warm_wasted": 2,
    }
    report = store.report()
    store.report = lambda: report | {"counters": counters}
    write_report(path, store, seconds=(10.0, 13.0))
    text = path.read_text()
    assert "kv load keys and values 1" in text
    assert "kv save keys and values 0" in text
    assert "keys and values saved</span>" in text
    for cells in (
        "<td>experts in memory when chosen</td><td>75.0%</td>",
        "<td>chosen experts that were foreseen</td><td>75.0%</td>",
        "<td>experts in VRAM when chosen</td><td>40.0%</td>",
        "<td>7, 0.003 GB</td>",
        "<td>5, 2</td>",
        "<td>2.000 GB</td>",
        "<td>2 of 3</td>",
    ):
        assert cells in text
