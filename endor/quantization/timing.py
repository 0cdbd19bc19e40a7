"""How long quantising matrices takes on this processor, by trying it on a made-up one."""

import math
import time
from collections import Counter
from collections.abc import Sequence

import torch

from endor.quantization.ecq import Ecq
from endor.quantization.rates import Curve

PROBE_ROWS, PROBE_COLS = 512, 768
"""The most of a probe: a tenth of a second, large enough that calls are not all of it."""


def coding_seconds(shapes: Sequence[tuple[int, ...]], bits: float) -> float:
    """Return about how long `Ecq` takes for matrices of `shapes` at `bits` a weight.

    A random matrix as large as the commonest of them, up to a bound, is quantised twice; the
    second is timed. What it took a weight is what all take: factors, whose operations grow with the
    third power of the columns, are the smaller part up to some thousand columns.
    """
    common = Counter(shapes).most_common(1)[0][0]
    rows = min(math.prod(common[:-1]), PROBE_ROWS)
    cols = min(common[-1], PROBE_COLS)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, cols, generator=generator)
    inputs = torch.randn(cols + 1, cols, generator=generator)
    gram = inputs.T @ inputs / len(inputs)
    spent = 0.0
    for _ in range(2):
        began = time.perf_counter()
        for _ in ("survey", "code"):  # factored for each, as in a layer
            problem = Ecq(weight, gram, dtype=torch.bfloat16)
        Curve.of(problem, weight.numel(), 1.0, bits)
        problem.fit(bits)
        spent = time.perf_counter() - began
    return spent / max(weight.numel(), 1) * sum(map(math.prod, shapes))
