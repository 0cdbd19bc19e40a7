"""Which way a weight is multiplied follows from the constants, for every number of rows."""

from dataclasses import replace

import pytest

from endor.planning import machine as hardware
from endor.planning.products import (
    MOST_ROWS,
    NEVER,
    PRODUCT_ROWS,
    choose,
    head_rows,
    head_s,
    multiply_s,
    packed_rows,
    packed_s,
    wide_rows,
)
from endor.planning.unit_cost import UnitCost

EMULATES = replace(
    hardware.typical("BF16"),
    linear_gbps=8.0,
    gemm_gflops=14.0,
    float32_gflops=80.0,
    widen_gbps=20.0,
    read_gbps=20.0,
)
NATIVE = replace(EMULATES, gemm_gflops=400.0)


def unit(product_s, row_cost=0.1, expand_s=2e-3, weights=10**6):
    return UnitCost("u", 1, 1, weights, expand_s, 1e-3, product_s, 1.0, True, row_cost)


def test_a_slow_product_is_not_taken():
    assert packed_rows(unit(1e-3), EMULATES) == PRODUCT_ROWS
    assert packed_rows(unit(4e-3), EMULATES) == 0
    assert packed_rows(unit(1e-3, row_cost=1.0), NATIVE) == 3


@pytest.mark.parametrize("machine", [EMULATES, NATIVE])
@pytest.mark.parametrize("row_cost", [0.01, 0.3, 1.5])
@pytest.mark.parametrize("product_s", [1e-4, 1e-3, 2e-3, 1e-2])
def test_fast_is_never_slower_than_exact(machine, row_cost, product_s):
    cost = unit(product_s, row_cost)
    limit = packed_rows(cost, machine)
    for rows in [*range(1, PRODUCT_ROWS + 1), 64, 1000]:
        exact = cost.expand_s + multiply_s(cost, machine, rows, wide=False)
        fast = cost.expand_s + multiply_s(cost, machine, rows, wide=True)
        if rows <= limit:
            fast = packed_s(cost, rows)
        assert fast <= exact


def test_float32_where_bfloat16_is_emulated_and_nowhere_else():
    assert 1 < wide_rows(EMULATES) < 8
    assert wide_rows(NATIVE) == NEVER
    assert wide_rows(replace(EMULATES, dtype="F32")) == NEVER
    assert wide_rows(hardware.typical("BF16")) == NEVER
    late = replace(EMULATES, gemm_gflops=79.0)
    assert MOST_ROWS > wide_rows(late) > 8 or wide_rows(late) == NEVER


def test_a_choice_names_every_unit():
    found = choose([unit(1e-3), replace(unit(4e-3), name="v")], EMULATES)
    assert found.packed_rows == {"u": PRODUCT_ROWS, "v": 0}
    assert found.wide_rows == wide_rows(EMULATES)


def test_a_head_is_multiplied_by_whichever_product_is_faster():
    assert head_rows(EMULATES) == 0  # never measured
    assert head_rows(replace(EMULATES, plain_gbps=7.0, plain_row_cost=0.1)) == 0
    assert head_rows(replace(NATIVE, plain_gbps=16.0, plain_row_cost=0.5)) == 2
    fast = replace(EMULATES, plain_gbps=24.0, plain_row_cost=0.1)
    assert head_rows(fast) == PRODUCT_ROWS == choose([], fast).head_rows
    for machine in (EMULATES, fast):
        for rows in (1, PRODUCT_ROWS, PRODUCT_ROWS + 1, 64):
            exact, own = (head_s(machine, 1e6, rows, own=each) for each in (False, True))
            faster = rows <= head_rows(machine)
            assert own < exact if faster else own == exact
