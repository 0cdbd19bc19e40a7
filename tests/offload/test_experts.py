"""Experts are valued by use and age, and the cache keeps the ones of greatest value."""

import threading
from math import inf, log2

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from endor.offload.experts import Popularity
from endor.offload.state import Phase
from endor.planning import Placement

from ..support.packed_files import make_packed, wait_until

EXPERTS = 6


@settings(deadline=None)
@given(
    st.lists(st.sets(st.integers(0, 7), min_size=1, max_size=3), min_size=1, max_size=60),
    st.sampled_from([1.0, 8.0, 500.0]),
)
def test_a_value_is_the_faded_sum_of_uses(visits, half_life):
    popularity = Popularity(half_life)
    for chosen in visits:
        popularity.observe(0, chosen)
    for expert in range(8):
        ages = [len(visits) - at for at, chosen in enumerate(visits, 1) if expert in chosen]
        value = popularity.value(expert) - len(visits) / half_life
        if ages:
            assert value == pytest.approx(log2(sum(2 ** (-age / half_life) for age in ages)))
        else:
            assert value == -inf


def test_layers_age_by_their_own_visits():
    popularity = Popularity(1)
    popularity.observe(0, [0])
    popularity.observe(1, [10])
    for _ in range(5):
        popularity.observe(0, [1])
    assert popularity.value(0) == popularity.value(10)


@pytest.fixture
def experts(tmp_path):
    """Six experts of one size, and a matrix that every step uses."""
    shapes = [(64, 64)] * EXPERTS + [(32, 64)]
    return make_packed(tmp_path / "a.safetensors", shapes, routed=range(EXPERTS))


def use(mover, *names, group=0):
    """Route to units, as a layer of experts does."""
    states = [mover.states[name] for name in names]
    mover.hint(states, group=group)
    for state in states:
        mover.take(state)
    mover.drop()


def in_memory(mover):
    return {name for name, state in mover.states.items() if state.phase is Phase.READY}


def test_the_least_used_expert_gives_way(experts):
    mover = experts.mover(experts.placement(3 * experts.largest, resident=[6]))
    for name in ("w0", "w1", "w0", "w1", "w2", "w3"):
        use(mover, name)
    # least recently used are w0 and w1, but they were used twice
    assert {"w0", "w1", "w3"} <= in_memory(mover)
    assert mover.states["w2"].phase is Phase.ABSENT
    counters = mover.ledger.counters
    assert (counters.expert_uses, counters.expert_hits, counters.evicted) == (6, 2, 1)
    mover.close()


def test_resident_experts_are_the_start_of_a_cache(experts):
    placement = experts.placement(experts.largest, resident=[0, 1, 6])
    mover = experts.mover(placement)
    mover.preload()
    assert {"w0", "w1", "w6"} <= in_memory(mover)
    assert mover.cache_bytes == 2 * experts.units[0].nbytes
    assert mover.staging_bytes == experts.largest
    for _ in range(2):
        use(mover, "w2", "w3")
    assert {"w2", "w3"} <= in_memory(mover), "what is used displaces what was only placed"
    assert mover.ledger.counters.expert_hits == 2
    mover.close()


def test_experts_that_all_fit_are_fixed(experts):
    mover = experts.mover(experts.placement(experts.largest, resident=range(EXPERTS)))
    mover.preload()
    assert mover.cache_bytes == 0
    assert all(mover.states[f"w{at}"].fixed is not None for at in range(EXPERTS))
    mover.close()


def test_a_right_guess_is_there_when_it_is_chosen(experts):
    mover = experts.mover(experts.placement(experts.nbytes))
    mover.warm([mover.states["w2"], mover.states["w4"]])
    wait_until(lambda: {"w2", "w4"} <= in_memory(mover))
    use(mover, "w2", "w5")
    counters = mover.ledger.counters
    assert (counters.guesses, counters.guessed_uses, counters.right_guesses) == (2, 2, 1)
    assert (counters.warm_reads, counters.warm_used, counters.warm_wasted) == (2, 1, 0)
    assert (counters.expert_uses, counters.expert_hits) == (2, 1)
    for name in ("w0", "w1", "w3", "w5"):
        use(mover, name)
    mover.close()


def test_a_wrong_guess_is_given_up_first(experts):
    mover = experts.mover(experts.placement(2 * experts.largest, resident=[6]))
    use(mover, "w0")
    mover.warm([mover.states["w1"]])
    wait_until(lambda: "w1" in in_memory(mover))
    use(mover, "w2")
    assert mover.states["w1"].phase is Phase.ABSENT
    assert "w0" in in_memory(mover)
    assert mover.ledger.counters.warm_wasted == 1
    mover.close()


def test_a_guess_whose_read_has_not_begun_is_taken_back(experts):
    experts.disk.gate = threading.Event()
    mover = experts.mover(experts.placement(experts.nbytes, resident=[6]), threads=1)
    wait_until(lambda: experts.disk.calls > 0)  # the resident is being read
    mover.warm([mover.states["w1"], mover.states["w2"]])
    mover.hint([mover.states["w2"]])
    assert mover.states["w1"].phase is Phase.ABSENT
    assert mover.states["w2"].phase is Phase.QUEUED
    counters = mover.ledger.counters
    assert (counters.warm_revoked, counters.right_guesses, counters.expert_late) == (1, 1, 1)
    experts.disk.gate.set()
    mover.take(mover.states["w2"])
    mover.close()


def test_a_demand_goes_before_guesses(experts):
    """The area is full of guesses that wait to be read; a demand is served all the same."""
    experts.disk.gate = threading.Event()
    mover = experts.mover(experts.placement(2 * experts.largest, resident=[6]), threads=1)
    wait_until(lambda: experts.disk.calls > 0)
    mover.warm([mover.states["w1"], mover.states["w2"]])
    taker = threading.Thread(target=mover.take, args=(mover.states["w5"],), daemon=True)
    taker.start()
    wait_until(lambda: mover.states["w5"].waiters > 0)
    experts.disk.gate.set()
    taker.join(60)
    assert not taker.is_alive()
    reads = [event.name for event in mover.ledger.events if event.kind == "read"]
    assert reads[:2] == ["w6", "w5"]
    assert mover.ledger.counters.warm_revoked > 0
    mover.close()


def test_guesses_leave_room_for_nothing_they_displace_in_use(experts):
    """Guesses neither take what a thread holds nor what was announced for the present layer."""
    mover = experts.mover(experts.placement(2 * experts.largest, resident=[6]))
    mover.hint([mover.states["w0"], mover.states["w1"]])
    mover.take(mover.states["w0"])
    mover.warm([mover.states["w2"], mover.states["w3"]])
    assert mover.states["w2"].phase is Phase.ABSENT
    mover.take(mover.states["w1"])
    mover.drop()
    mover.close()


def test_experts_of_uneven_size_replace_each_other(tmp_path):
    """Sizes that differ a little take the same room, so that the area does not crumble."""
    shapes = [(64, 96 + 2 * at) for at in range(8)]
    packed = make_packed(tmp_path / "a.safetensors", shapes, routed=range(8))
    sizes = {unit.nbytes for unit in packed.units}
    mover = packed.mover(
        Placement(dict.fromkeys((u.name for u in packed.units), "disk"), 3 * max(sizes))
    )
    for at in range(64):
        use(mover, f"w{at * 5 % 8}")
        assert len(in_memory(mover)) == min(at + 1, 3)
    mover.close()
