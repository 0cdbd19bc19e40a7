"""What a conversion reads: a model opened, and what prunes or quantises it."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

from endor.checkpoint.companions import QUANTIZATION_KEY, quantization_name
from endor.checkpoint.located import located
from endor.checkpoint.open import open_source
from endor.checkpoint.reading import WeightPruner
from endor.checkpoint.sources.contract import CheckpointSource
from endor.checkpoint.sources.dequantized import DequantizedSource
from endor.errors import ConfigError, PruningError
from endor.pruning import run as pruning
from endor.pruning.contract import Progress as LayerProgress
from endor.pruning.contract import PruneOptions
from endor.pruning.run import Prepared
from endor.quantization import run as quantization
from endor.quantization.contract import QuantizeOptions


@contextmanager
def opened(
    model: Path | str | CheckpointSource,
    check: Callable[[Path], None] | None = None,
    revision: str | None = None,
    *,
    dequantize: bool = False,
) -> Iterator[CheckpointSource]:
    """Yield the source, which is closed iff it was opened here, and checked for before."""
    if not isinstance(model, (str, Path)):
        yield DequantizedSource(model) if dequantize else model
        return
    model = located(model, revision=revision)
    if check is not None:
        check(model)
    with closing(open_source(model)) as source:
        yield DequantizedSource(source) if dequantize else source


@contextmanager
def prepared(
    source: CheckpointSource,
    prune: PruneOptions | WeightPruner,
    selected: frozenset[str],
    quantize: QuantizeOptions | None,
    quality: float | None,
    calibrate: bool,
    layers: LayerProgress | None,
) -> Iterator[Prepared]:
    """Yield what to convert.

    Raises:
        ConfigError: There is nothing to prune.
        PruningError: The weights are codes of a quantisation.
    """
    with ExitStack() as stack:
        if quantize is None and quality is None:
            found = stack.enter_context(pruning.prepared(source, prune, selected, progress=layers))
            _check_selection(source, selected, found.pruner)
        else:
            found = stack.enter_context(
                quantization.prepared(
                    source,
                    prune,
                    quantize or QuantizeOptions(),
                    selected,
                    quality=quality,
                    calibrate=calibrate,
                    progress=layers,
                )
            )
        yield found


def _check_selection(
    source: CheckpointSource, selected: frozenset[str], pruner: WeightPruner | None
) -> None:
    if pruner is not None and not selected:
        raise ConfigError(
            f"{source.path}: nothing to prune: none of {len(source.tensors)} tensors is a matrix "
            "of a layer; name some with include"
        )
    quantized = (source.config() or {}).get(QUANTIZATION_KEY)
    if pruner is not None and quantized:
        raise PruningError(
            f"{source.path}: config.json says that its weights are quantized "
            f"({quantization_name(quantized)}): their sizes mean nothing without their scales; "
            "prune the checkpoint it was made from"
        )
