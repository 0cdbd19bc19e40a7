"""The order of use is learned and predicted across its end."""

import threading
from itertools import islice

from hypothesis import given
from hypothesis import strategies as st

from endor.offload.schedule import Schedule


def ahead(schedule, count):
    return list(islice(schedule.ahead(), count))


def test_starts_with_the_given_order():
    schedule = Schedule([3, 5, 7])
    assert ahead(schedule, 9) == [3, 5, 7]
    assert schedule.last is None


def test_the_order_is_a_cycle():
    schedule = Schedule([1, 2, 3])
    assert all(schedule.observe(unit) for unit in (1, 2, 3))
    assert ahead(schedule, 2) == [1, 2]
    assert schedule.observe(1)


def test_learns_another_order_in_one_pass():
    schedule = Schedule([1, 2, 3, 4])
    for unit in (1, 3, 2, 4, 1):
        schedule.observe(unit)
    assert ahead(schedule, 4) == [3, 2, 4, 1]
    assert all(schedule.observe(unit) for unit in (3, 2, 4, 1))


def test_a_detour_costs_two_wrong_guesses():
    schedule = Schedule([1, 2, 3, 9])
    for _ in range(2):
        for unit in (1, 2, 3):
            schedule.observe(unit)
    assert not schedule.observe(9)
    assert not schedule.observe(2)
    assert schedule.observe(3)


def test_repeats_and_strangers_are_ignored():
    schedule = Schedule([1, 2])
    schedule.observe(1)
    assert schedule.observe(1)
    assert schedule.observe(77)
    assert ahead(schedule, 1) == [2]


def test_nothing_to_stream():
    assert ahead(Schedule([]), 1) == []


def test_units_that_follow_each_other_in_a_circle_can_be_forgotten():
    """What is expanded once, at load, is used in an order of its own: a circle among the gone."""
    schedule = Schedule(range(6))
    for unit in (3, 4, 5, 3):
        schedule.observe(unit)
    thread = threading.Thread(target=schedule.forget, args=([3, 4, 5],), daemon=True)
    thread.start()
    thread.join(10)
    assert not thread.is_alive()
    assert list(schedule.ahead()) == [0, 1, 2]


@given(
    used=st.lists(st.integers(0, 7), max_size=30),
    gone=st.sets(st.integers(0, 9), max_size=9),
    again=st.lists(st.integers(0, 7), max_size=12),
)
def test_what_is_forgotten_is_not_expected(used, gone, again):
    schedule = Schedule(range(8))
    for unit in used:
        schedule.observe(unit)
    schedule.forget(gone)
    ahead = list(schedule.ahead())
    assert len(set(ahead)) == len(ahead)
    rest = set(range(8)) - gone
    if rest:
        assert ahead
        assert rest.issuperset(ahead)
    for _ in range(2):
        for unit in again:
            schedule.observe(unit)
    if len(set(again)) > 1 and again[0] != again[-1]:
        assert set(schedule.ahead()) <= set(again) | rest
