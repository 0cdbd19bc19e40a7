"""What experts cost a token by where they lie: small cases come out as by hand."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from endor.bench.generation.expert_places import COPYING, WAYS, compare_places, cost, places_table
from endor.bench.generation.experts import simulate
from endor.errors import ConfigError
from endor.planning.catalogue import described
from endor.planning.exchanges import Times
from endor.planning.sketch import Matrix, method, sketch_costs

from .test_experts import trace_of

MACHINE = described("rtx4090").machine()
(EXPERT,) = sketch_costs(
    [Matrix("expert", 4 << 20, routed=True)], method(sparsity=0.5), MACHINE, expert_use=1.0
)
TIMES = Times.of(EXPERT, MACHINE, 1)


def random_trace(seed: int, tokens: int = 60, layers: int = 3, experts: int = 8):
    """Two of eight experts are chosen, some of them often, others after half of the tokens."""
    rng = np.random.default_rng(seed)
    weights = 1.0 / np.arange(1, experts + 1)
    chosen = [
        [
            np.roll(np.arange(experts), token // (tokens // 2) * 3)[
                rng.choice(experts, 2, replace=False, p=weights / weights.sum())
            ]
            for _ in range(layers)
        ]
        for token in range(tokens)
    ]
    return trace_of(chosen, experts=experts)


def test_experts_that_stay_cost_their_place():
    trace = random_trace(0)
    host = cost(trace, "host", 6, EXPERT, MACHINE)
    assert host.token_s == pytest.approx(6 * TIMES.host)
    assert (host.hit_rate, host.link_bytes, host.capacity) == (0.0, 0.0, 0)
    whole = cost(trace, "layers", 24, EXPERT, MACHINE)
    assert whole.token_s == pytest.approx(6 * TIMES.here)
    assert (whole.hit_rate, whole.link_bytes) == (1.0, 0.0)
    one = cost(trace, "layers", 15, EXPERT, MACHINE)  # not two whole layers
    assert one.hit_rate == pytest.approx(1 / 3)


def test_a_device_may_multiply_from_the_packed_form():
    trace = random_trace(0)
    dense_s = EXPERT.dense_bytes / MACHINE.link.hbm_gbps / 1e9
    found = cost(trace, "layers", 24, EXPERT, MACHINE, device_rate=2.0)
    assert found.token_s == pytest.approx(6 * dense_s / 2)


@settings(max_examples=8, deadline=None)
@given(st.integers(0, 1 << 30), st.integers(2, 20))
def test_copies_are_the_misses_of_the_cache(seed, capacity):
    trace = random_trace(seed)
    for way, name in COPYING.items():
        found = cost(trace, way, capacity, EXPERT, MACHINE)
        expected = simulate(trace, name, capacity)
        assert found.hit_rate == pytest.approx(expected.hit_rate)
        assert found.link_bytes == pytest.approx(expected.reads_per_token * EXPERT.packed_bytes)
        misses = expected.uses - expected.hits
        seconds = expected.uses * TIMES.here + misses * TIMES.copy
        assert found.token_s == pytest.approx(seconds / expected.tokens)


def test_exchanges_follow_the_uses():
    """Another quarter of the experts is used from the middle on."""
    chosen = [[[0, 1]] for _ in range(100)] + [[[6, 7]] for _ in range(300)]
    trace = trace_of(chosen, experts=8)
    found = cost(trace, "endor", 2, EXPERT, MACHINE)
    assert found.hit_rate > 0.9
    assert found.token_s < cost(trace, "host", 2, EXPERT, MACHINE).token_s / 2
    steady = trace_of([[[0, 4]] for _ in range(400)], experts=8)  # those that begin there
    still = cost(steady, "endor", 2, EXPERT, MACHINE)
    assert (still.hit_rate, still.link_bytes) == (1.0, 0.0)


def test_uses_that_are_all_alike_move_nothing_for_long():
    rng = np.random.default_rng(0)
    chosen = [[rng.permutation(64)[:2]] for _ in range(600)]
    trace = trace_of(chosen, experts=64)
    found = cost(trace, "endor", 16, EXPERT, MACHINE)
    # A copy must be saved twice as often as it is made: chance moves less than every use would.
    assert found.link_bytes < 0.5 * cost(trace, "lru", 16, EXPERT, MACHINE).link_bytes


def test_a_machine_and_a_place_are_needed():
    with pytest.raises(ConfigError, match="got 1 places"):
        cost(random_trace(0), "lru", 1, EXPERT, MACHINE)


def test_the_table_has_a_row_a_way():
    trace = random_trace(1)
    found = list(compare_places(trace, (0.25, 0.5), EXPERT, MACHINE))
    lines = places_table(trace, found).splitlines()
    assert lines[0] == "| experts | 6 of 24 in VRAM | 12 of 24 in VRAM |"
    assert [line.split("`")[1] for line in lines[2:]] == list(WAYS)
    assert all("ms, " in line and line.endswith("MB |") for line in lines[2:])
