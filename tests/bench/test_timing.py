import pytest

from endor.bench import timing
from endor.bench.timing import Subject, Timing, race, rotation
from endor.errors import ConfigError


def test_subjects_take_turns_after_a_warm_up():
    calls = []
    subjects = [
        Subject("a", lambda turn: calls.append(("a", turn))),
        Subject("b", lambda turn: calls.append(("b", turn)), lambda turn: calls.append("ready")),
    ]

    found = race(subjects, repeats=2, warmup=1)

    one = lambda turn: [("a", turn), "ready", ("b", turn)]  # noqa: E731
    assert calls == one(-1) + one(0) + one(1)
    assert [len(found[name].samples) for name in "ab"] == [2, 2]


def test_a_slow_subject_leaves_after_its_budget_and_three_samples(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock[0])

    def spend(seconds):
        def run(_):
            clock[0] += seconds

        return run

    found = race([Subject("slow", spend(9)), Subject("fast", spend(1))], repeats=6, budget_s=10)

    assert found["slow"].samples == (9.0, 9.0, 9.0)
    assert found["fast"].samples == (1.0,) * 6


def test_preparation_is_not_timed(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock[0])

    def prepare(_):
        clock[0] += 100

    def run(_):
        clock[0] += 1

    assert race([Subject("a", run, prepare)], repeats=1)["a"].samples == (1.0,)


def test_percentiles_interpolate():
    five = Timing((1.0, 2.0, 3.0, 4.0, 5.0))
    assert (five.p20, five.p50, five.p80) == pytest.approx((1.8, 3.0, 4.2))
    assert Timing((7.0,)).p80 == 7.0


def test_wrong_races_are_refused():
    with pytest.raises(ConfigError, match="repeats must be at least 1"):
        race([], repeats=0)
    with pytest.raises(ConfigError, match="two subjects share a name"):
        race([Subject("a", id), Subject("a", id)], repeats=1)


def test_rotating_buffers_exceed_twice_the_cache():
    assert rotation(90, 32) == 2
    assert rotation(10, 32) == 7
    assert rotation(1, 1000) == 8
    assert rotation(0, 1000) == 8
