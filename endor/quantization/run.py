"""One quantisation of a checkpoint, pruned first or not: what a conversion then reads."""

from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from typing import Any

from endor.checkpoint.reading import WeightPruner
from endor.checkpoint.sources.contract import CheckpointSource
from endor.errors import ConfigError
from endor.pruning.contract import NOTHING, Progress, PruneOptions
from endor.pruning.run import Prepared, described, is_calibrated, weight_pruner
from endor.quantization.contract import QuantizeOptions


@contextmanager
def prepared(
    source: CheckpointSource,
    prune: PruneOptions | WeightPruner,
    options: QuantizeOptions,
    selected: frozenset[str],
    *,
    quality: float | None = None,
    calibrate: bool = True,
    progress: Progress | None = None,
) -> Iterator[Prepared]:
    """Yield what to convert so that `selected` tensors come out in codes.

    Args:
        source: The dense checkpoint; stays open.
        prune: How to prune first, and how to calibrate both.
        options: How to quantise.
        selected: Names of the tensors to quantise.
        quality: Divergence from the dense model's predictions, in nats a token, for which the
            fewest bits are searched; those of `options` otherwise.
        calibrate: Whether there is calibration text; without, each weight is rounded by itself.
        progress: Called with layers done, layers in all, and what goes on.

    Raises:
        ConfigError: It cannot be done without calibration.
        PruningError, QuantizationError, DTypeError, BackendError: See `QuantizedSource`.
    """
    from endor.quantization.search import found_quality
    from endor.quantization.source import QuantizedSource, RoundedSource, WeightPrunedSource

    if not calibrate and (quality is not None or is_calibrated(prune)):
        raise ConfigError("a wanted quality, and a calibrated method, need calibration text")
    about: dict[str, Any] = {}
    pruner = weight_pruner(prune)
    if pruner is not None:
        about = described(pruner)
        source = WeightPrunedSource(source, pruner, selected, repr(about))
        options = replace(options, keep_zeros=True)
    if not isinstance(prune, PruneOptions):
        prune = PruneOptions(method=NOTHING.name)
    elif pruner is not None:
        prune = replace(prune, method=NOTHING.name)
    if not calibrate:
        rounded = RoundedSource(source, options, selected)
        yield Prepared(rounded, None, about, rounded.describe_quantization())
        return
    with ExitStack() as stack:
        if quality is not None:
            prune, options = stack.enter_context(
                found_quality(source, prune, options, selected, quality, progress=progress)
            )
        found = QuantizedSource(source, prune, options, selected, progress=progress)
        stack.enter_context(closing(found))
        if prune.method != NOTHING.name:
            about = found.describe()
        yield Prepared(found, None, about, found.describe_quantization())
