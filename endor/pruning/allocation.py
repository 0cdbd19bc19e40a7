"""A sparsity for each decoder layer that keeps the mean: linear in depth, OWL, or from a file.

Layers differ in how much pruning hurts them. From 65 to 70 % of zeros on, giving more to those that
bear it pays; below, uniform is as good.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from endor.errors import ConfigError
from endor.jsontext import parse_object
from endor.pruning.contract import PruneOptions

LINEAR_SPREAD = 0.1
OWL_SPREAD = 0.08
OWL_OUTLIER = 5.0
MOST = 0.99


def layer_sparsities(
    options: PruneOptions, layers: int, outliers: Callable[[], Sequence[float]]
) -> list[float]:
    """Return the sparsity of each layer.

    `linear[:SPREAD]` rises from sparsity - SPREAD / 2 in the first layer to sparsity + SPREAD / 2
    in the last (arXiv 2502.14770). `owl[:SPREAD]` gives layers with many outliers less, within
    SPREAD of the mean (arXiv 2310.05175). A JSON file `{layer: sparsity}` sets those it names and
    leaves the others at the sparsity of the options.

    Args:
        options: The rule, and the mean.
        layers: How many there are.
        outliers: Gives each layer's share of outliers; called for OWL only.

    Raises:
        ConfigError: The rule is none of these, does not go with an N:M pattern, or leaves [0, 1).
    """
    mean = options.target_sparsity
    rule, _, parameter = options.layer_sparsity.partition(":")
    if rule == "uniform" and not parameter:
        return [mean] * layers
    if options.parsed_pattern.structured:
        raise ConfigError(
            f"layer_sparsity: {options.layer_sparsity!r} needs an unstructured pattern, got "
            f"{options.pattern}, which fixes the sparsity of every layer; use uniform"
        )
    if rule == "linear":
        spread = _spread(parameter, LINEAR_SPREAD)
        offsets = [spread * (layer / max(1, layers - 1) - 0.5) for layer in range(layers)]
        chosen = [mean + offset for offset in offsets] if layers > 1 else [mean]
    elif rule == "owl":
        chosen = owl(outliers(), mean, _spread(parameter, OWL_SPREAD))
    else:
        chosen = _from_file(Path(options.layer_sparsity), mean, layers)
    for layer, sparsity in enumerate(chosen):
        if not 0 <= sparsity <= MOST:
            raise ConfigError(
                f"layer_sparsity: layer {layer} would get {sparsity:.3f}, must be in [0, {MOST}]; "
                "use a smaller spread"
            )
    return chosen


def owl(outliers: Sequence[float], mean: float, spread: float) -> list[float]:
    """Return sparsities of the given mean, lowest where outliers are most frequent.

    The densities are the outlier shares scaled to a range of twice `spread` (OWL, section 3).
    """
    low, high = min(outliers), max(outliers)
    if high <= low:
        return [mean] * len(outliers)
    density = [(share - low) / (high - low) * 2 * spread for share in outliers]
    middle = sum(density) / len(density)
    return [mean - (value - middle) for value in density]


def outlier_share(scores: Sequence[torch.Tensor]) -> float:
    """Return the share of Wanda scores of a layer that exceed `OWL_OUTLIER` times their mean.

    Each matrix is compared with its own mean.
    """
    above = sum(int((score > OWL_OUTLIER * score.mean()).sum()) for score in scores)
    return above / max(1, sum(score.numel() for score in scores))


def _spread(text: str, default: float) -> float:
    try:
        spread = float(text) if text else default
    except ValueError:
        spread = -1.0
    if not 0 <= spread < 1:
        raise ConfigError(f"layer_sparsity: SPREAD must be a number in [0, 1), got {text!r}")
    return spread


def _from_file(path: Path, mean: float, layers: int) -> list[float]:
    if not path.exists():
        raise ConfigError(
            f"layer_sparsity: must be uniform, linear[:SPREAD], owl[:SPREAD] or a JSON file, got "
            f"{str(path)!r}"
        )
    try:
        content = parse_object(path.read_bytes(), f"{path}:", error=ConfigError)
        found = {int(layer): float(value) for layer, value in content.items()}
    except (ValueError, TypeError, ConfigError) as error:
        raise ConfigError(f"{path}: must be JSON {{layer: sparsity}}: {error}") from None
    beyond = sorted(layer for layer in found if not 0 <= layer < layers)
    if beyond:
        raise ConfigError(f"{path}: names layer {beyond[0]}, the model has 0 to {layers - 1}")
    return [found.get(layer, mean) for layer in range(layers)]
