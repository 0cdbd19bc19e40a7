"""Packing as one call, for the library and the commands alike.

What is selected, how it becomes zero or integers, where it is written: `pruning.run` and
`quantization.run` say what the conversion reads, `checkpoint` converts.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from endor.checkpoint.companions import QUANTIZATION_KEY, quantization_name
from endor.checkpoint.composite import is_composite, pack_composite
from endor.checkpoint.convert import DEFAULT_SHARD_BYTES, convert, pack_writes
from endor.checkpoint.located import located
from endor.checkpoint.manifest import Writes
from endor.checkpoint.neurons import Neurons, find_neurons
from endor.checkpoint.output import check_output
from endor.checkpoint.pack_options import Made, PackOptions, Part
from endor.checkpoint.recode import FieldedSource, recodable
from endor.checkpoint.report import PackReport, Progress
from endor.checkpoint.select import select
from endor.checkpoint.single import pack_file
from endor.checkpoint.sources.contract import CheckpointSource, fetching
from endor.checkpoint.sources.dequantized import DequantizedSource
from endor.checkpoint.targets import output_path
from endor.codecs import CodecChoice
from endor.errors import ConfigError
from endor.packing.neurons import counting
from endor.packing.predictors import RECALL, check_recall, predicting
from endor.packing.prepared import opened, prepared
from endor.pruning.contract import Progress as LayerProgress
from endor.pruning.contract import PruneOptions
from endor.pruning.run import Prune, is_calibrated, resolved
from endor.quantization.contract import QuantizeOptions

MIN_SHARD_BYTES = 1 << 20


def pack_checkpoint(
    model: Path | str | CheckpointSource,
    out_dir: Path | str,
    *,
    revision: str | None = None,
    prune: Prune = None,
    sparsity: float = 0.5,
    pattern: str = "unstructured",
    quantize: QuantizeOptions | None = None,
    quality: float | None = None,
    calibrate: bool = True,
    description: Mapping[str, Any] | None = None,
    quantized: Mapping[str, Any] | None = None,
    dequantize: bool = False,
    codec: CodecChoice = "auto",
    neurons: bool = False,
    count: bool = False,
    bundle_neurons: bool = False,
    predict: bool = False,
    recall: float = RECALL,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    stream: bool = False,
    part: Part | None = None,
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
            each is packed by itself), a .safetensors file, a packed directory, the id of a model on
            the Hub (`org/name`, `org/name@revision`), or a source that yields (already pruned)
            tensors.
        out_dir: The directory to make; or the file, where `model` is a lone file and this ends in
            `.safetensors`.
        revision: A branch, tag or commit of a model on the Hub; its main branch when omitted.
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
        dequantize: Read weights of another quantised format as the dense ones that they stand for:
            so they can be run, pruned and quantised. Their codes are stored, where nothing else is
            asked for.
        codec: For the packed tensors: "auto", "raw", "exp" or "dense".
        neurons: Store the second matrices of feed-forward blocks by neuron, where the activation is
            exactly zero for many: their product then skips those.
        count: Count in how many tokens of the calibration text of `prune` each such neuron is
            active, and store that: it says which are worth keeping in memory.
        predict: Make predictors of active neurons from the calibration text, which whoever loads
            the model may use; what comes out is then not the model's own.
        recall: Share of the active neurons that they shall name.
        bundle_neurons: As `neurons`, each neuron in one run of bytes: for disks and processors.
        include: Patterns (globs, or `re:` and a regular expression) of tensors to pack besides the
            matrices of the layers.
        exclude: Patterns of tensors to leave as they are.
        max_shard_bytes: Size that a file does not exceed, unless one record does.
        stream: Fetch the shards of a model on the Hub while earlier ones are packed, and delete
            them behind. Without calibration only.
        part: What this process does of a run of several, from `endor.packing.shares`.
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
    if (quantizes or dequantize) and codec != "auto":
        raise ConfigError(f"codec: quantised tensors take codec int, not {codec!r}; leave it out")
    neurons = neurons or bundle_neurons
    if neurons and (quantizes or dequantize or codec == "dense"):
        raise ConfigError("neurons: stores codecs raw and exp by neuron, no integers; leave it out")
    for name, wanted in (("count", count), ("predict", predict)):
        if wanted and (not neurons or stream or part is not None):
            raise ConfigError(
                f"{name}: goes with neurons, of a model that is packed by one process and not "
                "streamed; leave it out"
            )
    check_recall(recall)
    out, how = output_path(out_dir), resolved(prune, sparsity, pattern)
    if stream and (is_calibrated(how) or (quantizes and calibrate) or dequantize):
        raise ConfigError(
            "--stream reads each weight once: it packs lossless, with --prune magnitude or "
            "magnitude-row, and with --bits and --calibration none; for calibration, and where "
            "scales lie beside weights, leave it out"
        )
    if isinstance(model, (str, Path)) and not stream:
        model = located(model, revision=revision)
    if isinstance(model, Path) and not stream and is_composite(model):
        if part or quantizes or dequantize or neurons or is_calibrated(how):
            raise ConfigError(
                f"{model}: holds several models, which are packed lossless or with --prune "
                "magnitude; for more, pack the folder of one"
            )
        return pack_composite(
            model,
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

    where = out if stream else None
    with opened(model, check, revision, stream_into=where, dequantize=dequantize) as source:
        selected = select(source.tensors.values(), include=include, exclude=exclude)
        if quantizes or count or predict or is_calibrated(how):
            check(source.path, pack_writes(source))
        stored = (source.config() or {}).get(QUANTIZATION_KEY)
        by_neuron = Neurons()
        if neurons:
            by_neuron = find_neurons(source, selected, bundled=bundle_neurons)
        made: dict[str, Made] = {}
        asked = how if isinstance(how, PruneOptions) else PruneOptions()
        if count and by_neuron.matrices:
            made |= counting(source, asked, by_neuron.matrices, layers)
        if predict and by_neuron.matrices:
            made |= predicting(source, asked, by_neuron.matrices, recall, layers)
        with prepared(source, how, selected, quantize, quality, calibrate, layers) as found:
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
                source.quantization if isinstance(source, DequantizedSource) else "",
                by_neuron,
                made,
            )
            report = convert(
                found.source,
                out,
                selected=selected,
                pruner=found.pruner,
                options=about,
                recoded=recoded,
                part=part,
                resume=resume,
                overwrite=overwrite,
                threads=threads,
                progress=progress,
            )
    remote = fetching(source)
    return replace(
        report,
        stored_quantization=quantization_name(stored) if stored else "",
        streamed_shards=remote.most_shards if remote is not None else 0,
    )
