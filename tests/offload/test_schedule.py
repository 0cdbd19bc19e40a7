"""The order of use is learned and predicted across its end."""

from itertools import islice

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
