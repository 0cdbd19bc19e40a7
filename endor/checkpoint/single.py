"""One safetensors file to one packed file, which `endor.load_file` reads: no checkpoint."""

import time
from contextlib import closing
from pathlib import Path

from endor import kernels
from endor.checkpoint.pipeline import OrderedWork
from endor.checkpoint.plan import plan_units, stored_arrays
from endor.checkpoint.reading import Loaded, TensorLoader, WeightPruner
from endor.checkpoint.recode import Layouts, encode_codes, largest_fields_spec, recode
from endor.checkpoint.report import PackReport, Progress, Sizes, no_progress
from endor.checkpoint.sources.contract import CheckpointSource, CodedSource, SourceTensor
from endor.codecs import CodecChoice, Encoded, TensorSpec, dense
from endor.errors import CheckpointError, OutputExistsError
from endor.storage import FileLayout, FileWriter, header_capacity, largest_spec
from endor.storage.writer import largest_int_spec


def pack_file(
    source: CheckpointSource,
    out: Path,
    *,
    selected: frozenset[str],
    pruner: WeightPruner | None,
    codec: CodecChoice,
    recoded: Layouts | None = None,
    overwrite: bool = False,
    threads: int | None = None,
    progress: Progress | None = None,
) -> PackReport:
    """Write `source` to the file `out`, which appears whole or not at all.

    Errors as for `pack_checkpoint`.
    """
    began = time.perf_counter()
    if out.resolve() == source.path.resolve():
        raise CheckpointError(f"{out}: is the input; choose another OUT")
    if out.is_dir() or (out.exists() and not overwrite):
        raise OutputExistsError(
            f"{out}: exists already; choose another OUT, or add --overwrite to replace it"
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    recoded = recoded or {}
    units = plan_units(source.tensors.values(), selected, recoded)
    loader = TensorLoader(source, pruner, selected)
    coded = source if isinstance(source, CodedSource) and pruner is None else None

    def largest(tensor: SourceTensor) -> TensorSpec:
        if coded and tensor.name in selected:
            return largest_int_spec(tensor.shape, tensor.dtype, (1, 1))
        if tensor.name in recoded and tensor.name not in selected:
            return largest_fields_spec(tensor, recoded[tensor.name])
        return _largest(tensor, selected)

    plan = {unit.name: {tensor.name: largest(tensor) for tensor in unit.tensors} for unit in units}

    def encode(tensor: SourceTensor) -> tuple[Loaded | None, Encoded]:
        codes = coded.coded(tensor.name) if coded and tensor.name in selected else None
        if codes is not None:
            return None, encode_codes(codes, tensor)
        loaded = loader.load(tensor)
        if tensor.name in recoded:
            smaller = recode(loaded.bits, tensor, recoded[tensor.name], threads=1)
            if smaller is not None:
                return loaded, smaller
        if tensor.dtype.bits:
            return loaded, dense.encode_as(loaded.bits, tensor.dtype, tensor.shape)
        chosen = codec if tensor.name in selected else "dense"
        return loaded, kernels.encode(loaded.bits, tensor.dtype, codec=chosen, threads=1)

    done, total = 0, sum(unit.nbytes for unit in units)
    report = progress or no_progress
    report(0, total)
    work = OrderedWork(
        encode,
        lambda tensor: tensor.nbytes,
        threads=kernels.thread_count(threads),
        budget_bytes=loader.budget_bytes,
        prepare=loader.prepare,
    )
    tensors = (tensor for unit in units for tensor in unit.tensors)
    with (
        FileWriter(out, header_capacity=header_capacity(plan)) as writer,
        closing(work.run(tensors)) as results,
    ):
        for unit in units:
            with writer.record(unit.name) as record:
                for tensor in unit.tensors:
                    _, (loaded, encoded) = next(results)
                    record.add(tensor.name, encoded)
                    if loaded is not None:
                        loader.pool.give(loaded.buffer)
                    done += tensor.nbytes
                    report(done, total)
    sizes = Sizes.of([FileLayout.read(out)])
    seconds = time.perf_counter() - began
    return PackReport(out, sizes, 0, seconds, total, recodable_tensors=len(recoded))


def _largest(tensor: SourceTensor, selected: frozenset[str]) -> TensorSpec:
    if tensor.name in selected and len(stored_arrays(tensor, packed=True)) > 1:
        return largest_spec(tensor.shape, tensor.dtype)
    return TensorSpec(tensor.shape, tensor.dtype, "dense", False, tensor.numel)
