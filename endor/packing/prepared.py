"""What a conversion reads: a model opened, and what prunes or quantises it."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

from endor.checkpoint.companions import QUANTIZATION_KEY, quantization_name
from endor.checkpoint.located import located
from endor.checkpoint.open import open_source
from endor.checkpoint.partial import SOURCE_NAME
from endor.checkpoint.reading import WeightPruner
from endor.checkpoint.sources.contract import CheckpointSource
from endor.checkpoint.sources.dequantized import DequantizedSource
from endor.checkpoint.targets import target_of
from endor.errors import ConfigError, PruningError
from endor.hub.names import hub_name
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
    stream_into: Path | None = None,
    dequantize: bool = False,
) -> Iterator[CheckpointSource]:
    """Yield the source, which is closed iff it was opened here, and checked for before."""
    if not isinstance(model, (str, Path)):
        yield DequantizedSource(model) if dequantize else model
        return
    if stream_into is not None:
        with closing(streamed(model, revision, stream_into)) as source:
            if check is not None:
                check(source.path)
            yield source
        return
    model = located(model, revision=revision)
    if check is not None:
        check(model)
    with closing(open_source(model)) as source:
        yield DequantizedSource(source) if dequantize else source


def streamed(model: Path | str, revision: str | None, out: Path) -> CheckpointSource:
    """Return a model on the Hub that is fetched as it is packed into `out`.

    Raises:
        ConfigError: It is no model on the Hub.
        HubError, CheckpointError: See `StreamedSource`.
    """
    from endor.sharing.streamed import StreamedSource

    name = hub_name(model, revision)
    if name is None:
        raise ConfigError(f"{model}: is no model on the Hub, which --stream is for; leave it out")
    target = target_of(out)
    return StreamedSource(name, target.with_name(f"{target.name}.partial") / SOURCE_NAME)


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
