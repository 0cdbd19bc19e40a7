"""Packing and pruning as one call each, for the library and the commands alike.

What is selected, how it becomes zero or integers, where it is written: `pruning.run` and
`quantization.run` say what the conversion reads, `checkpoint` converts.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from endor.checkpoint.companions import QUANTIZATION_KEY, quantization_name
from endor.checkpoint.composite import is_composite, pack_composite
from endor.checkpoint.convert import DEFAULT_SHARD_BYTES, PackOptions, convert, pack_writes
from endor.checkpoint.dense import dense_writes, write_dense
from endor.checkpoint.manifest import Writes
from endor.checkpoint.open import open_source
from endor.checkpoint.output import check_output
from endor.checkpoint.reading import WeightPruner
from endor.checkpoint.recode import FieldedSource, recodable
from endor.checkpoint.report import DenseReport, PackReport, Progress
from endor.checkpoint.select import select
from endor.checkpoint.single import pack_file
from endor.checkpoint.sources.contract import CheckpointSource
from endor.checkpoint.targets import output_path
from endor.codecs import CodecChoice
from endor.errors import ConfigError, PruningError
from endor.pruning import run as pruning
from endor.pruning.contract import Progress as LayerProgress
from endor.pruning.contract import PruneOptions
from endor.pruning.run import Prepared, Prune, is_calibrated, resolved
from endor.quantization import run as quantization
from endor.quantization.contract import QuantizeOptions

if TYPE_CHECKING:
    from endor.pruning.mask_writer import MaskReport

MIN_SHARD_BYTES = 1 << 20


def pack_checkpoint(
    model: Path | str | CheckpointSource,
    out_dir: Path | str,
    *,
    prune: Prune = None,
    sparsity: float = 0.5,
    pattern: str = "unstructured",
    quantize: QuantizeOptions | None = None,
    quality: float | None = None,
    calibrate: bool = True,
    description: Mapping[str, Any] | None = None,
    quantized: Mapping[str, Any] | None = None,
    codec: CodecChoice = "auto",
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    resume: bool = False,
    overwrite: bool = False,
    threads: int | None = None,
    progress: Progress | None = None,
    layers: LayerProgress | None = None,
) -> PackReport:
    """Write a checkpoint in packed form and return what came out.

    Packed codes of a checkpoint that is quantised already are entropy-coded as they are, where
    nothing but that is asked for.

    Tensors are read, pruned, encoded and written one by one: memory stays below three times the
    largest tensor and 300 MB; with calibration, a decoder layer and its statistics come to it.
    `out_dir` appears when all is done; until then everything lies in `out_dir.partial`, from where
    `resume` goes on.

    Args:
        model: A Hugging Face directory, a folder of several models (a diffusers pipeline, of which
            each is packed by itself), a .safetensors file, a packed directory, or a source that
            yields (already pruned) tensors.
        out_dir: The directory to make; or the file, where `model` is a lone file and this ends in
            `.safetensors`.
        prune: None or "none" keeps every bit; a name of `endor.pruning.METHODS`; `PruneOptions`,
            which say how to calibrate besides; or an object with a `prune` method.
        sparsity: Share of zeros in every pruned matrix, where `prune` is a name.
        pattern: "unstructured", or "N:M" for N survivors in every M, where `prune` is a name.
        quantize: Store integers times steps, at so many bits a weight.
        quality: Quantise at the fewest bits whose predictions diverge by at most so many nats a
            token from the dense model's; the bits of `quantize` are not looked at.
        calibrate: Whether a quantisation sees calibration text, that of `prune`.
        description: What config.json says about the pruning, where `model` yields pruned tensors.
        quantized: What it says about the quantisation, where `model` yields quantised ones.
        codec: For the packed tensors: "auto", "raw", "exp" or "dense".
        include: Patterns (globs, or `re:` and a regular expression) of tensors to pack besides the
            matrices of the layers.
        exclude: Patterns of tensors to leave as they are.
        max_shard_bytes: Size that a file does not exceed, unless one record does.
        resume: Go on with an interrupted run.
        overwrite: Replace `out_dir`.
        threads: Workers; every CPU when omitted.
        progress: Called with dense bytes done and in total.
        layers: Called with layers calibrated, layers in all, and what goes on.

    Raises:
        CheckpointError: the input is incomplete, or the output cannot be made.
        OutputExistsError: there is an output, and neither `resume` nor `overwrite`.
        ConfigError: an option makes no sense, or a pattern matches nothing.
        PruningError, QuantizationError, DTypeError: a selected tensor cannot be changed so.
        BackendError: a library or device that calibration needs is missing.
        OSError: from the file system.
    """
    if max_shard_bytes < MIN_SHARD_BYTES:
        raise ConfigError(
            f"max_shard_bytes: must be at least {MIN_SHARD_BYTES}, got {max_shard_bytes}"
        )
    quantizes = quantize is not None or quality is not None
    if quantizes and codec != "auto":
        raise ConfigError(f"codec: quantised tensors take codec int, not {codec!r}; leave it out")
    out, how = output_path(out_dir), resolved(prune, sparsity, pattern)
    if isinstance(model, (str, Path)) and is_composite(model):
        if quantizes or is_calibrated(how):
            raise ConfigError(
                f"{model}: holds several models, which are packed lossless or with --prune "
                "magnitude; for more, pack the folder of one"
            )
        return pack_composite(
            Path(model),
            out,
            pack_checkpoint,
            prune=prune,
            sparsity=sparsity,
            pattern=pattern,
            codec=codec,
            include=include,
            exclude=exclude,
            max_shard_bytes=max_shard_bytes,
            resume=resume,
            overwrite=overwrite,
            threads=threads,
            progress=progress,
        )

    def check(path: Path, writes: Writes | None = None) -> None:
        # A file that becomes a file is looked at when it is packed.
        if not (path.is_file() and out.suffix == ".safetensors"):
            check_output(out, path, writes=writes, resume=resume, overwrite=overwrite)

    with _opened(model, check) as source:
        selected = select(source.tensors.values(), include=include, exclude=exclude)
        if quantizes or is_calibrated(how):
            check(source.path, pack_writes(source))
        stored = (source.config() or {}).get(QUANTIZATION_KEY)
        with _prepared(source, how, selected, quantize, quality, calibrate, layers) as found:
            lossless = not (quantizes or found.pruner or is_calibrated(how))
            recoded = recodable(source, exclude) if lossless and codec == "auto" else {}
            if source.directory is None and out.suffix == ".safetensors":
                if isinstance(source, FieldedSource):
                    raise ConfigError(f"{out}: a GGUF file is packed into a directory; name one")
                if resume:
                    raise ConfigError(f"{out}: a single file is packed in one go; drop --resume")
                return pack_file(
                    found.source,
                    out,
                    selected=selected,
                    pruner=found.pruner,
                    codec=codec,
                    recoded=recoded,
                    overwrite=overwrite,
                    threads=threads,
                    progress=progress,
                )
            about = PackOptions(
                codec,
                max_shard_bytes,
                description or found.description,
                quantized or found.quantized,
            )
            report = convert(
                found.source,
                out,
                selected=selected,
                pruner=found.pruner,
                options=about,
                recoded=recoded,
                resume=resume,
                overwrite=overwrite,
                threads=threads,
                progress=progress,
            )
    return replace(report, stored_quantization=quantization_name(stored) if stored else "")


def prune_checkpoint(
    model: Path | str | CheckpointSource,
    out_dir: Path | str,
    *,
    prune: Prune = "magnitude",
    sparsity: float = 0.5,
    pattern: str = "unstructured",
    quantize: QuantizeOptions | None = None,
    quality: float | None = None,
    calibrate: bool = True,
    description: Mapping[str, Any] | None = None,
    quantized: Mapping[str, Any] | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    resume: bool = False,
    overwrite: bool = False,
    threads: int | None = None,
    progress: Progress | None = None,
    layers: LayerProgress | None = None,
) -> DenseReport:
    """Write a checkpoint pruned, or quantised, and dense, in files laid out like the input's.

    Arguments and errors as for `pack_checkpoint`.
    """
    out, how = output_path(out_dir), resolved(prune, sparsity, pattern)

    def check(path: Path, writes: Writes | None = None) -> None:
        check_output(out, path, writes=writes, resume=resume, overwrite=overwrite)

    with _opened(model, check) as source:
        selected = select(source.tensors.values(), include=include, exclude=exclude)
        if quantize is not None or quality is not None or is_calibrated(how):
            check(source.path, dense_writes(source))
        with _prepared(source, how, selected, quantize, quality, calibrate, layers) as found:
            codes = dict(quantized or found.quantized)
            about = dict(description or found.description)
            report = write_dense(
                found.source,
                out,
                selected=selected,
                pruner=found.pruner,
                description=about | ({"quantize": codes} if codes else {}),
                resume=resume,
                overwrite=overwrite,
                threads=threads,
                progress=progress,
            )
    return replace(report, quantize=codes)


def prune_to_masks(
    model: Path | str | CheckpointSource,
    out: Path | str,
    *,
    prune: Prune = "magnitude",
    sparsity: float = 0.5,
    pattern: str = "unstructured",
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    overwrite: bool = False,
    threads: int | None = None,
    progress: Progress | None = None,
    layers: LayerProgress | None = None,
) -> "MaskReport":
    """Write to the file `out` which weights a pruning keeps, one bit each, and no weights.

    Arguments and errors as for `pack_checkpoint`.
    """
    from endor.pruning.mask_writer import check_mask_target, write_masks

    out, how = Path(out), resolved(prune, sparsity, pattern)
    with _opened(model) as source:
        check_mask_target(out, source.path, overwrite=overwrite)
        selected = select(source.tensors.values(), include=include, exclude=exclude)
        with _prepared(source, how, selected, None, None, True, layers) as found:
            return write_masks(
                found.source,
                out,
                prune=found.pruner,
                description=found.description,
                include=include,
                exclude=exclude,
                overwrite=overwrite,
                threads=threads,
                progress=progress,
            )


@contextmanager
def _opened(
    model: Path | str | CheckpointSource, check: Callable[[Path], None] | None = None
) -> Iterator[CheckpointSource]:
    """Yield the source, which is closed iff it was opened here, and checked for before."""
    if not isinstance(model, (str, Path)):
        yield model
        return
    if check is not None:
        check(Path(model))
    with closing(open_source(model)) as source:
        yield source


@contextmanager
def _prepared(
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
