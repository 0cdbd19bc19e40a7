"""ECQ against plain GPTQ on the same statistics, and against matrices that break quantisers."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch

from endor.codecs.integer import round_steps, size_bits
from endor.errors import PruningError, QuantizationError
from endor.pruning.layer import relative_error
from endor.quantization.ecq import Ecq, entropy, histogram
from endor.quantization.quantizer import zeros_to_keep


def problem(rows=96, cols=160, tokens=2000, seed=0):
    """Return float32 weights and the Gram matrix of correlated inputs of different sizes."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(cols, cols, generator=generator)
    inputs = torch.randn(tokens, cols, generator=generator) @ mix
    inputs *= torch.exp(torch.randn(cols, generator=generator))
    weight = torch.randn(rows, cols, generator=generator) * 0.02
    return weight, inputs.T @ inputs / tokens


def ecq(weight, gram, **named):
    before = weight.clone(), gram.clone()
    found = Ecq(weight, gram, dtype=torch.bfloat16, **named)
    assert torch.equal(weight, before[0])
    assert torch.equal(gram, before[1])
    return found


def plain_gptq(weight, gram, bits, group, dampening=0.01):
    """Symmetric integers, one scale for each row and group from its largest magnitude, searched."""
    top = 2 ** (bits - 1) - 1
    damped = gram.double() + dampening * gram.diagonal().mean() * torch.eye(len(gram))
    factor = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True).float()
    work, out = weight.clone(), torch.empty_like(weight)
    for col in range(weight.shape[1]):
        if col % group == 0:
            part = work[:, col : col + group]
            worth = 1 / factor.diagonal()[col : col + group].square()
            best, scale = None, None
            for share in torch.linspace(0.5, 1, 11):
                trial = part.abs().amax(1, keepdim=True) * share / top
                error = (((part / trial).round().clamp(-top, top) * trial - part) ** 2) @ worth
                better = torch.ones_like(error, dtype=torch.bool) if best is None else error < best
                scale = trial[:, 0] if scale is None else torch.where(better, trial[:, 0], scale)
                best = error if best is None else torch.minimum(error, best)
        out[:, col] = (work[:, col] / scale).round().clamp(-top, top) * scale
        error = (work[:, col] - out[:, col]) / factor[col, col]
        work[:, col + 1 :] -= error[:, None] * factor[col, col + 1 :]
    return out


@pytest.mark.parametrize("bits", [2.0, 2.5, 3.0, 3.5, 4.25, 6.0, 8.0])
@pytest.mark.parametrize(("rows", "cols"), [(96, 160), (300, 65), (40, 300)])
def test_the_rate_is_hit(bits, rows, cols):
    weight, gram = problem(rows, cols)
    coded = ecq(weight, gram).fit(bits)
    assert coded.bits == pytest.approx(bits, abs=0.02)
    assert size_bits(coded.codes.numpy(), coded.steps.numpy()) == coded.bits


@pytest.mark.parametrize(("bits", "group"), [(3, 32), (4, 32), (4, 160)])
@pytest.mark.parametrize("seed", range(3))
def test_the_error_is_smaller_than_plain_gptqs_at_fewer_bits(bits, group, seed):
    weight, gram = problem(seed=seed)
    plain = relative_error(weight, plain_gptq(weight, gram, bits, group), gram)
    coded = ecq(weight, gram).fit(bits + 16 / group - 0.1)
    assert relative_error(weight, coded.values, gram) < plain


def test_a_bit_more_is_a_quarter_of_the_error():
    weight, gram = problem()
    found = ecq(weight, gram)
    errors = [relative_error(weight, found.fit(bits).values, gram) for bits in (3, 4, 5, 6)]
    for worse, better in pairwise(errors):
        assert 3.0 < worse / better < 5.0


def test_feedback_and_rate_decisions_pay():
    weight, gram = problem()
    coded = ecq(weight, gram).fit(2.5)
    low, high = -20.0, 5.0
    for _ in range(60):  # plain rounding with one step, at the same entropy
        middle = (low + high) / 2
        plain = (weight / 2**middle).round()
        low, high = (middle, high) if _entropy(plain) > _entropy(coded.codes) else (low, middle)
    rounded = relative_error(weight, plain * 2**middle, gram)
    assert relative_error(weight, coded.values, gram) < 0.7 * rounded


def _entropy(codes):
    return entropy(histogram(codes))


def test_what_is_stored_is_what_was_fed_back():
    weight, gram = problem()
    coded = ecq(weight, gram).fit(3)
    assert coded.codes.dtype == torch.int16
    assert np.array_equal(round_steps(coded.steps.numpy()), coded.steps.numpy())
    product = (coded.codes.float() * coded.steps).bfloat16()
    assert torch.equal(coded.values, product.float() + 0.0)
    assert not bool((torch.signbit(coded.values) & (coded.values == 0)).any())


def test_the_same_input_gives_the_same_bits():
    weight, gram = problem()
    first, second = ecq(weight, gram).fit(3), ecq(weight, gram).fit(3)
    assert torch.equal(first.codes, second.codes)
    assert torch.equal(first.steps, second.steps)


def test_zeros_that_are_kept_stay_and_the_others_make_up_for_them():
    weight, gram = problem()
    weight = torch.where(torch.rand(weight.shape) < 0.5, weight, 0.0)
    keep = zeros_to_keep(weight, None)
    assert torch.equal(keep, weight != 0)
    coded = ecq(weight, gram, keep=keep).fit(2.5)
    assert bool((coded.codes[~keep] == 0).all())
    assert coded.bits == pytest.approx(2.5, abs=0.02)
    assert zeros_to_keep(weight, False) is None
    dense, _ = problem()
    dense[0, 0] = 0.0
    assert zeros_to_keep(dense, None) is None
    assert not zeros_to_keep(dense, True)[0, 0]


def test_inputs_that_never_fire_and_weights_of_zero_are_survived():
    weight, gram = problem()
    gram[[3, 70]] = 0
    gram[:, [3, 70]] = 0
    weight[:, 9] = 0
    weight[5] = 0
    coded = ecq(weight, gram).fit(3)
    assert bool(torch.isfinite(coded.values).all())
    assert coded.bits == pytest.approx(3, abs=0.02)
    assert relative_error(weight, coded.values, gram) < 0.05


@pytest.mark.parametrize("rank", [0, 1, 5])
def test_degenerate_statistics_are_survived(rank):
    weight, _ = problem()
    inputs = torch.randn(rank, 160)
    coded = ecq(weight, inputs.T @ inputs).fit(4)
    assert bool(torch.isfinite(coded.values).all())
    assert coded.bits == pytest.approx(4, abs=0.02)


@pytest.mark.parametrize("shape", [(1, 1), (1, 300), (300, 1), (3, 2), (2, 64), (0, 4), (4, 0)])
def test_tiny_and_thin_matrices_come_out_whole(shape):
    weight, gram = problem(*shape, tokens=50) if 0 not in shape else (torch.empty(shape), None)
    gram = torch.eye(shape[1]) if gram is None else gram
    coded = ecq(weight, gram).fit(4)
    assert coded.codes.shape == shape
    assert bool(torch.isfinite(coded.values).all())


@pytest.mark.parametrize("weight", [torch.zeros(8, 16), torch.full((8, 16), 0.5)])
def test_constant_matrices_come_out_as_they_are(weight):
    coded = ecq(weight, torch.eye(16)).fit(4)
    torch.testing.assert_close(coded.values, weight, rtol=0.02, atol=0)


def test_an_outlier_keeps_its_size():
    weight, gram = problem()
    weight[4, 7] = 100.0
    coded = ecq(weight, gram).fit(3.5)
    assert coded.bits == pytest.approx(3.5, abs=0.02)
    assert float(coded.values[4, 7]) == pytest.approx(100, rel=0.01)


def test_what_is_not_finite_is_refused():
    weight, gram = problem()
    gram[3, 4] = math.nan
    with pytest.raises(PruningError, match="must be finite"):
        ecq(weight, torch.nan_to_num(gram, nan=math.inf))
    weight[0, 0] = math.inf
    with pytest.raises(QuantizationError, match="must be finite"):
        ecq(weight, torch.eye(160))
