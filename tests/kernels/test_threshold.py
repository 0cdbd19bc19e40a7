import numpy as np
import pytest

from endor.errors import BackendError, ShapeError
from endor.kernels.threshold import count16, zero_below16

MASK = 0x7FFF
SIZES = [0, 1, 3, 4, 5, 4095, 4096, 4097, 100_003]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("spread", [1, 5, 1 << 16])
def test_count(kernel, rng, size, spread):
    bits = rng.integers(0, spread, size).astype(np.uint16)
    counts = count16(bits, MASK, kernel=kernel)
    assert counts.shape == (1 << 15,)
    assert np.array_equal(counts, np.bincount(bits & MASK, minlength=1 << 15))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("spread", [1, 3, 300, 1 << 16])
@pytest.mark.parametrize("share", [0, 0.1, 0.5, 1])
def test_zero_below(kernel, rng, size, spread, share):
    bits = rng.integers(0, spread, size).astype(np.uint16)
    threshold = int(rng.integers(0, min(spread, MASK) + 1))
    ties = int(share * np.count_nonzero((bits & MASK) == threshold))
    expected = bits.copy()
    expected[(bits & MASK) < threshold] = 0
    expected[np.flatnonzero((bits & MASK) == threshold)[:ties]] = 0
    zero_below16(bits, MASK, threshold, ties, kernel=kernel)
    assert np.array_equal(bits, expected)


def test_arguments_are_checked(kernel):
    for bad in (np.zeros(4, np.uint8), np.zeros((2, 2), np.uint16), np.zeros(8, np.uint16)[::2]):
        with pytest.raises(ShapeError, match="must be flat, contiguous uint16"):
            count16(bad, MASK, kernel=kernel)
        with pytest.raises(ShapeError, match="must be flat, contiguous uint16"):
            zero_below16(bad, MASK, 1, 0, kernel=kernel)


def test_wide_masks_are_refused(compiled):
    bits = np.ones(4, np.uint16)
    with pytest.raises(BackendError):
        count16(bits, 0xFFFF, kernel=compiled)
    with pytest.raises(BackendError):
        zero_below16(bits, 0xFFFF, 1, 0, kernel=compiled)
    assert bits.all()
