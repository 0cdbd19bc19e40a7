"""The fewest bits at which a model's predictions stay as near to the dense model's as asked for."""

import math
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from endor.checkpoint.sources.contract import CheckpointSource
from endor.codecs.rounding import LEAST_BITS, MOST_BITS
from endor.errors import ConfigError
from endor.pruning.contract import Progress, PruneOptions
from endor.pruning.stream import LayerStream
from endor.quantization.contract import QuantizeOptions
from endor.quantization.quantizer import EcqQuantizer
from endor.quantization.source import check_quantizable

HELD_OUT = 16
"""Windows on which divergence is measured."""

START_BITS = 4.0
SLOPE = 2.0
"""Halvings of the divergence a bit, until two runs say what they are: a quarter of the squared
error."""

MOST_RUNS = 5
NEAR = 0.1
"""A run is accepted when its divergence is at most this share below what was asked for."""


@contextmanager
def found_quality(
    source: CheckpointSource,
    prune: PruneOptions,
    options: QuantizeOptions,
    selected: frozenset[str],
    divergence: float,
    *,
    progress: Progress | None = None,
) -> Iterator[tuple[PruneOptions, QuantizeOptions]]:
    """Yield options whose result diverges by at most `divergence`, and whose layers are kept.

    The divergence falls by nearly the same factor with every bit, so that few runs find it. Each
    is a whole quantisation of the model, with the held-out windows passed on behind the renewed and
    behind the dense layers. A source that is made with the options goes on from the best run's
    layers, in a folder that is removed at the end.

    Args:
        source: The dense checkpoint.
        prune: How to prune first and how to calibrate; fewer windows where the text is short.
        options: How to quantise, but for the bits.
        selected: Names of the tensors to quantise.
        divergence: KL(dense || quantised), nats a token.
        progress: See `LayerStream`.

    Raises:
        ConfigError: It cannot be reached, or the text is too short to hold windows out.
    """
    check_quantizable(source, selected)
    if prune.scratch is not None:
        prune.scratch.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="endor-quality-", dir=prune.scratch))
    try:
        yield _search(source, prune, options, selected, divergence, folder, progress)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _search(
    source: CheckpointSource,
    prune: PruneOptions,
    options: QuantizeOptions,
    selected: frozenset[str],
    divergence: float,
    folder: Path,
    progress: Progress | None,
) -> tuple[PruneOptions, QuantizeOptions]:
    best: tuple[PruneOptions, QuantizeOptions] | None = None
    runs: list[tuple[float, float]] = []  # bits and the logarithm of the divergence, base 2
    low, high = LEAST_BITS, MOST_BITS
    bits = START_BITS
    for number in range(MOST_RUNS):
        scratch = folder / str(number)
        scratch.mkdir()
        trial = replace(options, bits=bits)
        found, windows = _divergence(source, prune, trial, selected, scratch, progress)
        runs.append((bits, math.log2(max(found, 1e-12))))
        if found <= divergence:
            if best is not None and best[0].scratch is not None:
                shutil.rmtree(best[0].scratch)
            best = replace(prune, samples=windows, scratch=scratch), trial
            high = bits
        else:
            shutil.rmtree(scratch)
            low = bits
        if high - low < 0.02 or (best is not None and found <= divergence <= found / (1 - NEAR)):
            break
        # Aimed a little below, so that what comes out is accepted.
        wanted = math.log2(divergence * (1 - NEAR / 2))
        bits = round(_next(runs, wanted, low, high), 3)
    if best is None:
        bits, found = runs[-1][0], 2 ** runs[-1][1]
        raise ConfigError(
            f"quality: a divergence of {divergence} nats was not reached; {bits:.2f} bits a weight "
            f"gave {found:.2g}; ask for less, or for the bits"
        )
    return best


def _next(runs: list[tuple[float, float]], wanted: float, low: float, high: float) -> float:
    """Return the bits to try: on the line through the last two runs, inside what is open."""
    bits, level = runs[-1]
    slope = -SLOPE
    if len(runs) > 1 and runs[-2][0] != bits:
        slope = min((level - runs[-2][1]) / (bits - runs[-2][0]), -SLOPE / 4)
    guess = bits + (wanted - level) / slope
    margin = (high - low) / 20
    if high == MOST_BITS and guess >= high:
        return high
    return min(max(guess, low + margin), high - margin)


def _divergence(
    source: CheckpointSource,
    prune: PruneOptions,
    options: QuantizeOptions,
    selected: frozenset[str],
    scratch: Path,
    progress: Progress | None,
) -> tuple[float, int]:
    """Return the divergence of one quantisation, and how many windows it was calibrated on."""
    quantizer = EcqQuantizer(options)
    named = {"progress": progress, "quantizer": quantizer, "held_out": HELD_OUT}
    stream = LayerStream(source, prune, selected, scratch, **named)  # type: ignore[arg-type]
    try:
        while stream.done < stream.layers:
            stream.next_layer()
        return stream.divergence(), stream.windows
    finally:
        stream.close()
