"""Rounding to a size without calibration: the size is hit, the values are near."""

import numpy as np
import pytest

from endor.codecs.integer import size_bits
from endor.codecs.rounding import round_to_bits, threshold_shifts
from endor.errors import ConfigError, QuantizationError


@pytest.mark.parametrize("bits", [1.5, 2.0, 3.5, 4.5, 8.0])
@pytest.mark.parametrize("shape", [(512, 700), (20, 300), (3, 40, 50), (9000,)])
def test_the_size_is_hit(bits, shape, rng):
    values = rng.normal(size=shape).astype(np.float32)
    codes, step = round_to_bits(values, bits)
    assert codes.shape == shape
    assert size_bits(codes, step) == pytest.approx(bits, abs=0.02)
    error = np.square(values - codes * step[0, 0]).mean()
    assert error < 1.6 * 4.0**-bits * 2  # the Gaussian bound, twice for tables and a uniform grid


def test_a_bit_is_worth_more_than_a_nearer_value(rng):
    values = rng.normal(size=(400, 400)).astype(np.float32)
    codes, step = round_to_bits(values, 2.0)
    low, high = -5.0, 3.0
    for _ in range(40):
        middle = (low + high) / 2
        nearest = np.rint(values / 2**middle).astype(np.int16)
        low, high = (middle, high) if size_bits(nearest, step) > 2.0 else (low, middle)
    plain = np.square(values - nearest * 2**middle).mean()
    assert np.square(values - codes * step[0, 0]).mean() < plain


@pytest.mark.parametrize("values", [[], [0.0, 0.0], [3.0], [1e-38, 0.0], [3e38, -1.0]])
def test_tiny_tensors_come_out_whole(values):
    values = np.array(values, dtype=np.float32)
    codes, step = round_to_bits(values, 8.0)
    assert codes.shape == values.shape
    peak = np.abs(values).max(initial=0)
    assert np.abs(codes * step[0, 0] - values).max(initial=0) <= peak * 0.51


def test_shifts_are_those_of_the_counts():
    assert not threshold_shifts(np.array([100, 200, 200])).any()
    shifts = threshold_shifts(np.array([1000, 500, 10, 0]))
    assert shifts[0] == 0
    assert 0 < shifts[1] < shifts[2] <= 0.4


@pytest.mark.parametrize("bits", [0.0, 1.4, 8.6, float("nan")])
def test_a_size_out_of_range_is_refused(bits):
    with pytest.raises(ConfigError, match="must lie in 1"):
        round_to_bits(np.zeros(4, dtype=np.float32), bits)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused(value):
    with pytest.raises(QuantizationError, match="must be finite"):
        round_to_bits(np.array([1.0, value], dtype=np.float32), 4.0)
