"""Experts are valued by use and age, and the cache keeps the ones of greatest value."""

import threading
from math import inf, log2

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from endor.offload import Phase
from endor.offload.expert_cache import Popularity
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


def use(engine, *names, group=0):
    """Route to units, as a layer of experts does."""
    states = [engine.states[name] for name in names]
    engine.hint(states, group=group)
    for state in states:
        engine.take(state)
    engine.drop()


def in_memory(engine):
    return {name for name, state in engine.states.items() if state.phase is Phase.READY}


def test_the_least_used_expert_gives_way(experts):
    engine = experts.engine(experts.placement(3 * experts.largest, resident=[6]))
    for name in ("w0", "w1", "w0", "w1", "w2", "w3"):
        use(engine, name)
    # least recently used are w0 and w1, but they were used twice
    assert {"w0", "w1", "w3"} <= in_memory(engine)
    assert engine.states["w2"].phase is Phase.ABSENT
    counters = engine.ledger.counters
    assert (counters.expert_uses, counters.expert_hits, counters.evicted) == (6, 2, 1)
    engine.close()


def test_resident_experts_are_the_start_of_a_cache(experts):
    placement = experts.placement(experts.largest, resident=[0, 1, 6])
    engine = experts.engine(placement)
    engine.preload()
    assert {"w0", "w1", "w6"} <= in_memory(engine)
    assert engine.cache_bytes == 2 * experts.units[0].nbytes
    assert engine.staging_bytes == experts.largest
    for _ in range(2):
        use(engine, "w2", "w3")
    assert {"w2", "w3"} <= in_memory(engine), "what is used displaces what was only placed"
    assert engine.ledger.counters.expert_hits == 2
    engine.close()


def test_experts_that_all_fit_are_fixed(experts):
    engine = experts.engine(experts.placement(experts.largest, resident=range(EXPERTS)))
    engine.preload()
    assert engine.cache_bytes == 0
    assert all(engine.states[f"w{at}"].fixed is not None for at in range(EXPERTS))
    engine.close()


def test_a_right_guess_is_there_when_it_is_chosen(experts):
    engine = experts.engine(experts.placement(experts.nbytes))
    engine.warm([engine.states["w2"], engine.states["w4"]])
    wait_until(lambda: {"w2", "w4"} <= in_memory(engine))
    use(engine, "w2", "w5")
    counters = engine.ledger.counters
    assert (counters.guesses, counters.guessed_uses, counters.right_guesses) == (2, 2, 1)
    assert (counters.warm_reads, counters.warm_used, counters.warm_wasted) == (2, 1, 0)
    assert (counters.expert_uses, counters.expert_hits) == (2, 1)
    for name in ("w0", "w1", "w3", "w5"):
        use(engine, name)
    engine.close()


def test_a_wrong_guess_is_given_up_first(experts):
    engine = experts.engine(experts.placement(2 * experts.largest, resident=[6]))
    use(engine, "w0")
    engine.warm([engine.states["w1"]])
    wait_until(lambda: "w1" in in_memory(engine))
    use(engine, "w2")
    assert engine.states["w1"].phase is Phase.ABSENT
    assert "w0" in in_memory(engine)
    assert engine.ledger.counters.warm_wasted == 1
    engine.close()


def test_a_guess_whose_read_has_not_begun_is_taken_back(experts):
    experts.disk.gate = threading.Event()
    engine = experts.engine(experts.placement(experts.nbytes, resident=[6]), threads=1)
    wait_until(lambda: experts.disk.calls > 0)  # the resident is being read
    engine.warm([engine.states["w1"], engine.states["w2"]])
    engine.hint([engine.states["w2"]])
    assert engine.states["w1"].phase is Phase.ABSENT
    assert engine.states["w2"].phase is Phase.QUEUED
    counters = engine.ledger.counters
    assert (counters.warm_revoked, counters.right_guesses, counters.expert_late) == (1, 1, 1)
    experts.disk.gate.set()
    engine.take(engine.states["w2"])
    engine.close()


def test_a_demand_goes_before_guesses(experts):
    """The area is full of guesses that wait to be read; a demand is served all the same."""
    experts.disk.gate = threading.Event()
    engine = experts.engine(experts.placement(2 * experts.largest, resident=[6]), threads=1)
    wait_until(lambda: experts.disk.calls > 0)
    engine.warm([engine.states["w1"], engine.states["w2"]])
    taker = threading.Thread(target=engine.take, args=(engine.states["w5"],), daemon=True)
    taker.start()
    wait_until(lambda: engine.states["w5"].waiters > 0)
    experts.disk.gate.set()
    taker.join(60)
    assert not taker.is_alive()
    reads = [event.name for event in engine.ledger.events if event.kind == "read"]
    assert reads[:2] == ["w6", "w5"]
    assert engine.ledger.counters.warm_revoked > 0
    engine.close()


def test_guesses_leave_room_for_nothing_they_displace_in_use(experts):
    """Guesses neither take what a thread holds nor what was announced for the present layer."""
    engine = experts.engine(experts.placement(2 * experts.largest, resident=[6]))
    engine.hint([engine.states["w0"], engine.states["w1"]])
    engine.take(engine.states["w0"])
    engine.warm([engine.states["w2"], engine.states["w3"]])
    assert engine.states["w2"].phase is Phase.ABSENT
    engine.take(engine.states["w1"])
    engine.drop()
    engine.close()


def test_experts_of_uneven_size_replace_each_other(tmp_path):
    """Sizes that differ a little take the same room, so that the area does not crumble."""
    shapes = [(64, 96 + 2 * at) for at in range(8)]
    packed = make_packed(tmp_path / "a.safetensors", shapes, routed=range(8))
    sizes = {unit.nbytes for unit in packed.units}
    engine = packed.engine(
        Placement(dict.fromkeys((u.name for u in packed.units), "disk"), 3 * max(sizes))
    )
    for at in range(64):
        use(engine, f"w{at * 5 % 8}")
        assert len(in_memory(engine)) == min(at + 1, 3)
    engine.close()
