"""What is said before a calibrated run: products, Gram matrices, solvers and coding all count."""

import math

import pytest

from endor.pruning.contract import METHODS, NOTHING, PruneOptions
from endor.pruning.estimate import Teller, duration, model_flops
from endor.quantization.timing import coding_seconds

SHAPES = [(64, 64)] * 4 + [(128, 64), (128, 64), (64, 128)]
"""Of one layer."""


def flops(method="none", *, coded=True, **named):
    options = PruneOptions(method=method, **named)
    return model_flops(SHAPES, 1, 1000, options, METHODS.get(method, NOTHING), coded=coded)


class Slow:
    """A quantizer that takes its time."""

    def seconds(self, shapes):
        return 10.0 * len(shapes)


def test_quantising_costs_forwards_and_gram_matrices():
    weights = sum(map(math.prod, SHAPES))
    forwards = 2 * 1000 * weights
    squares = 2 * 1000 * (6 * 64**2 + 128**2) * 4 / 7
    assert flops() == pytest.approx(4.5 * forwards + 2 * squares)
    assert flops(sequential=False) == pytest.approx(3 * forwards + 2 * squares)
    assert flops("wanda", coded=False) == pytest.approx(3.5 * forwards)
    assert flops("wanda") == pytest.approx(7 * forwards + 2 * squares)


def test_solving_and_training_cost_more():
    assert flops("sparsegpt", coded=False) > flops("wanda", coded=False)
    assert flops("auto") - flops("admm") == pytest.approx(
        7 * 2 * 1000 * sum(map(math.prod, SHAPES))
    )


def test_the_quantizers_own_time_is_told():
    told = []
    teller = Teller(3, lambda done, total, what: told.append((done, total, what)))
    teller.announce(SHAPES, 10, PruneOptions(method="none"), NOTHING, Slow())
    assert told[0][:2] == (0, 3)
    assert told[0][2].startswith("about 70 s at ")
    teller.report(1, [0.5])
    assert told[1][2].endswith("left, output error 0.500")


def test_coding_is_measured_and_grows_with_the_weights():
    for shapes in (SHAPES, [(3, 40, 50)], [(1, 1)], [(5000, 3)]):
        assert coding_seconds(shapes, 3.0) > 0
    assert duration(89) == "89 s"
    assert duration(120) == "2.0 min"
