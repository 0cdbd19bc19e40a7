"""What is said of a calibrated run: how long it takes, about, and how far it is."""

import math
import time
from collections.abc import Sequence

from endor import machine
from endor.pruning.contract import LayerQuantizer, Method, Progress, PruneOptions

GROUPS = 4 / 7
"""Gram matrices for each matrix: q, k and v share one, gate and up another."""

SOLVER_PRODUCTS = 20
"""Products with the Gram matrix that a solver takes: those of ADMM."""


class Teller:
    """Tells the caller how a run goes.

    Args:
        layers: In all.
        progress: Who is told; None for nobody.
    """

    def __init__(self, layers: int, progress: Progress | None) -> None:
        self._layers = layers
        self._progress = progress or (lambda done, total, what: None)
        self._began = time.perf_counter()

    def announce(
        self,
        shapes: Sequence[tuple[int, ...]],
        tokens: int,
        options: PruneOptions,
        method: Method,
        quantizer: LayerQuantizer | None,
    ) -> None:
        """Say how long it will take, by what this processor computes; see `model_flops`."""
        found = machine.arithmetic()
        gflops = found.gflops if method.finetune else found.float32_gflops
        coded = quantizer is not None
        flops = model_flops(shapes, self._layers, tokens, options, method, coded=coded)
        seconds = flops / gflops / 1e9
        if quantizer is not None:
            seconds += quantizer.seconds(shapes)
        self._progress(0, self._layers, f"about {duration(seconds)} at {gflops:.0f} Gflop/s")

    def report(self, done: int, errors: Sequence[float]) -> None:
        """Say that a layer is done, and the worst of its output errors."""
        left = (time.perf_counter() - self._began) / done * (self._layers - done)
        error = f", output error {max(errors):.3f}" if errors else ""
        self._progress(done, self._layers, f"{duration(left)} left{error}")


def model_flops(
    shapes: Sequence[tuple[int, ...]],
    layers: int,
    tokens: int,
    options: PruneOptions,
    method: Method,
    *,
    coded: bool,
) -> float:
    """Return the operations that a run takes, about: its products, Gram matrices, and ADMM.

    Args:
        shapes: Of the matrices that are renewed, in all layers.
        layers: Decoder layers.
        tokens: Of all calibration windows.
        options: Of the run.
        method: That it prunes by.
        coded: Whether matrices are quantised, after they were pruned if they are.
    """
    weights = sum(math.prod(shape) for shape in shapes) / max(1, layers)
    # Once to go on; for the statistics all of the layer, or its first part for each group.
    # Before quantising all of the layer is run once more, to share out bits.
    rewritten = int(method.calibrated) + int(coded)
    forwards = 1.0 + rewritten * (2.5 if options.sequential else 1.0) + int(coded)
    if method.finetune:
        forwards += 1 + 3 * options.passes
    flops = 2.0 * tokens * weights * forwards
    squares = sum(shape[-1] ** 2 for shape in shapes) / max(1, layers) * GROUPS
    flops += 2.0 * tokens * squares * (int(method.statistics == "gram") + 2 * int(coded))
    if method.statistics == "gram":
        solved = sum(math.prod(shape) * shape[-1] for shape in shapes) / max(1, layers)
        flops += 2.0 * SOLVER_PRODUCTS * solved
    return layers * flops


def duration(seconds: float) -> str:
    """Return a time for a reader."""
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.1f} min"
