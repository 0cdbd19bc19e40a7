"""Constants that were measured while others used the processor are found out, and do not last."""

import os
import threading
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from endor.planning import machine as hardware
from endor.planning import others
from endor.planning.constants import typical


def stat(tmp_path, **busy):
    """Write a /proc/stat of the processors that this process may use, and of one more."""
    lines = ["cpu  9 9 9 9 9 9 9 9 9 9"]
    for number in sorted(os.sched_getaffinity(0)):
        lines.append(
            f"cpu{number} {busy.get('user', 0)} 1 2 500 600 3 4 {busy.get('steal', 0)} 7 7"
        )
    lines += ["cpu99999 77777 0 0 0 0 0 0 0 0 0", "intr 5"]
    path = tmp_path / "stat"
    path.write_text("\n".join(lines))
    return path


def test_busy_time_is_that_of_ones_own_processors_without_idling(tmp_path):
    count = len(os.sched_getaffinity(0))
    found = others._busy_s(stat(tmp_path, user=100, steal=40))
    assert found == pytest.approx(count * (100 + 1 + 2 + 3 + 4 + 40) / others._TICKS)


@pytest.mark.parametrize("text", ["", "cpu0 one 2 3", "nothing"])
def test_what_cannot_be_read_says_nothing(tmp_path, text):
    (tmp_path / "stat").write_text(text)
    assert others._busy_s(tmp_path / "stat") is None
    assert others._busy_s(tmp_path / "none") is None


@pytest.mark.parametrize(
    ("used", "threads", "processors", "share"),
    [(0, 2, 2, 0), (1, 2, 2, 0.5), (2, 2, 8, 0), (7, 2, 8, 0.5), (9, 2, 8, 1), (0.02, 4, 4, 0.005)],
)
def test_idle_processors_are_not_missed(used, threads, processors, share):
    assert others.lost(used, threads, processors) == pytest.approx(share)


def test_ones_own_threads_are_no_others(monkeypatch):
    clock = {"busy": 0.0}
    monkeypatch.setattr(others, "_busy_s", lambda: clock["busy"])
    monkeypatch.setattr(others, "_processors", lambda: {0})
    watch = others.Others(1)
    thread = threading.Thread(target=lambda: sum(range(2_000_000)))
    thread.start()
    thread.join()
    assert watch.share() == 0.0  # nothing but itself: own time is taken off, and never below 0
    clock["busy"] = 1e6
    assert watch.share() == 1.0


def test_what_others_move_on_a_disk_is_told_from_ones_own(tmp_path):
    counts = tmp_path / "stat"
    counts.write_text("  9  9  1000  9  9  9  500  9  9  9  9\n")
    watch = others.OthersOnDisk(tmp_path, counts)
    assert watch.share(0) == 0.0
    counts.write_text("  9  9  1600  9  9  9  700  9  9  9  9\n")
    assert watch.share(0) == 1.0
    assert watch.share(600 * 512) == pytest.approx(0.25)
    assert watch.share(800 * 512) == 0.0
    assert watch.share(10**9) == 0.0


@pytest.mark.parametrize("text", ["", "1 2 three 4 5 6 7", None])
def test_a_disk_that_nothing_counts_says_nothing(tmp_path, text):
    if text is not None:
        (tmp_path / "stat").write_text(text)
    assert others.OthersOnDisk(tmp_path, tmp_path / "stat").share(0) == 0.0


def test_a_disturbed_disk_is_measured_again_after_a_while(tmp_path, monkeypatch):
    from endor import machine

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with (tmp_path / "weights").open("wb") as file:
        file.truncate(65 << 20)
    shares, calls = [0.5, 0.7, 0.0], []

    def probe(path):
        calls.append(path)
        rate = float(len(calls))
        rates = dict.fromkeys(("read_gbps", "slowest_gbps", "fastest_gbps", "cpu_s_per_gb"), rate)
        return {**rates, "direct": True, "disturbed": shares.pop(0)}

    monkeypatch.setattr(hardware.probes, "disk", probe)

    def aged():
        for key, entry in machine.load()["disks"].items():
            past = datetime.now(UTC) - timedelta(minutes=11)
            machine.store("disks", key, {**entry, "measured": past.isoformat()})

    found = hardware.disk(tmp_path / "weights")
    assert "50% of processor or disk" in hardware.disturbance(typical("BF16"), found)
    assert hardware.disk(tmp_path / "weights") == found
    aged()
    assert hardware.disk(tmp_path / "weights").read_gbps == 1.0  # the second was worse
    aged()
    found = hardware.disk(tmp_path / "weights")
    assert found.read_gbps == 3.0
    aged()
    assert hardware.disk(tmp_path / "weights").read_gbps == 3.0
    assert len(calls) == 3
    assert hardware.disturbance(typical("BF16"), found) == ""


@pytest.fixture
def measured(monkeypatch, tmp_path):
    """Let measuring give constants disturbed as a list says; return the calls and the list."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    calls, shares = [], []

    def measure(dtype="BF16"):
        calls.append(dtype)
        rates = {name: {kind: 5.0 for kind in typical(dtype).expand_gbps} for name in SMALL}
        return replace(
            typical(dtype),
            **rates,
            link=None,
            small_linear_gbps=5.0,
            float32_gflops=5.0,
            widen_gbps=5.0,
            plain_gbps=5.0,
            plain_row_cost=0.2,
            checksum_gbps=5.0,
            op_us=float(len(calls)),
            disturbed=shares.pop(0),
            measured=datetime.now(UTC).isoformat(),
        )

    monkeypatch.setattr(hardware, "measure", measure)
    return calls, shares


SMALL = ("small_expand_gbps", "small_product_gbps", "product_row_cost")


def age(minutes):
    """Make what is remembered that old."""
    from endor import machine

    content = machine.load()
    for key, entry in content["machines"].items():
        entry["constants"]["measured"] = (
            datetime.now(UTC) - timedelta(minutes=minutes)
        ).isoformat()
        machine.store("machines", key, entry)


def test_quiet_constants_stay(measured):
    calls, shares = measured
    shares += [0.05]
    found = hardware.machine()
    age(10_000)
    assert hardware.machine().op_us == found.op_us
    assert len(calls) == 1
    assert hardware.disturbance(found) == ""


def test_disturbed_constants_are_measured_again_after_a_while(measured):
    calls, shares = measured
    shares += [0.6, 0.02]
    first = hardware.machine()
    assert "60%" in hardware.disturbance(first)
    assert hardware.machine() == first  # not for every command of the next minutes
    age(11)
    assert hardware.machine().op_us == 2.0
    age(10_000)
    assert hardware.machine().op_us == 2.0
    assert len(calls) == 2


def test_the_less_disturbed_constants_stay(measured):
    calls, shares = measured
    shares += [0.3, 0.8, 0.2]
    hardware.machine()
    age(11)
    again = hardware.machine()
    assert (again.op_us, again.disturbed) == (1.0, 0.3)
    assert hardware.machine() == again  # the next try is ten minutes away
    age(11)
    assert hardware.machine().op_us == 3.0
    assert len(calls) == 3
