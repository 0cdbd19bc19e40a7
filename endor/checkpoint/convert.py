"""A dense checkpoint to a packed one, tensor by tensor.

Workers read, prune and encode; the calling thread appends the results in execution order to the
current shard. At most the largest tensor (or 96 MiB, if that is more) is in flight in dense form,
and as much again at most in packed form; both in memory that is used again.
"""

import hashlib
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from endor import kernels
from endor.checkpoint.companions import (
    Companions,
    copy_companions,
    find_companions,
    packed_config,
    planned_files,
)
from endor.checkpoint.directory import DIFFUSION_INDEX_NAME, PACKED_INDEX_NAME, is_diffusion
from endor.checkpoint.index import (
    build_index,
    dense_file_names,
    format_version,
    index_text,
    shard_name,
)
from endor.checkpoint.manifest import Writes
from endor.checkpoint.neurons import encode_turned
from endor.checkpoint.output import OutputDirectory
from endor.checkpoint.pack_options import Made, PackOptions, Part
from endor.checkpoint.pipeline import OrderedWork, ScratchPool
from endor.checkpoint.plan import Unit, plan_units
from endor.checkpoint.reading import TensorLoader, WeightPruner
from endor.checkpoint.recode import Layouts, encode_codes, recode
from endor.checkpoint.record_sizes import RecordSizes
from endor.checkpoint.report import PackReport, Progress, Sizes, no_progress
from endor.checkpoint.sources.contract import CheckpointSource, CodedSource, SourceTensor, fetching
from endor.checkpoint.verify import check_file
from endor.codecs import Encoded, dense
from endor.codecs.codes import Codes
from endor.errors import CheckpointError
from endor.hub.origin import Origin
from endor.storage import FileLayout, FileWriter
from endor.storage.layout import FORMAT_VERSION

DEFAULT_SHARD_BYTES = 4 << 30


def convert(
    source: CheckpointSource,
    out: Path,
    *,
    selected: frozenset[str],
    pruner: WeightPruner | None,
    options: PackOptions,
    recoded: Layouts | None = None,
    part: Part | None = None,
    resume: bool = False,
    overwrite: bool = False,
    threads: int | None = None,
    progress: Progress | None = None,
) -> PackReport:
    """Write `source` to `out` in packed form.

    Args:
        source: The checkpoint.
        out: The directory to make.
        selected: Names of the tensors to pack.
        pruner: Applied to these.
        options: What else the bytes depend on.
        recoded: Tensors with packed codes of another format, and where these may be.
        part: What this process does of a run of several; all when omitted.
        resume: As for `pack_checkpoint`, as the rest, and the errors.
        overwrite: As there.
        threads: As there.
        progress: As there.
    """
    began = time.perf_counter()
    recoded = recoded or {}
    units = plan_units(source.tensors.values(), selected, recoded)
    identity = {
        "kind": "packed",
        "format_version": FORMAT_VERSION,
        "source": source.fingerprint(),
        "codec": options.codec,
        "max_shard_bytes": options.max_shard_bytes,
        "selected": hashlib.sha256("\0".join(sorted(selected)).encode()).hexdigest(),
        "prune": dict(options.prune),
        "quantize": dict(options.quantize),
    }
    if recoded:
        text = "\0".join(f"{name}\0{recoded[name]}" for name in sorted(recoded))
        identity["recoded"] = hashlib.sha256(text.encode()).hexdigest()
    identity |= options.neurons.identity()
    if part is not None:
        units, identity = tuple(part.units(units)), part.identify(identity)
    described = options.describe()
    dense_files = dense_file_names(source.tensors.values())
    companions = find_companions(source)
    made: dict[str, bytes | Made] = {**options.made, **(part.files() if part is not None else {})}
    writes = {**_writes(companions, source.config()), **dict.fromkeys(made)}
    with OutputDirectory(
        out,
        identity=identity,
        source=source.path,
        writes=writes,
        resume=resume,
        overwrite=overwrite,
    ) as output:
        resumed = len(output.finished)
        report = progress or no_progress
        run = _Run(source, output, units, selected, recoded, pruner, options, report)
        run.part = part
        run.adopt_finished()
        run.write(kernels.thread_count(threads))
        layouts = run.name_shards()
        if isinstance(source, CodedSource) and "quantize" in described:
            described["quantize"] |= source.outcome()
        origin = Origin.of_path(source.path)
        if origin is not None:
            described = {**described, "source": origin.to_dict()}
        config = packed_config(source.config(), described, format_version(layouts))
        copy_companions(companions, output.folder, config)
        document = build_index(layouts, dense_files, writes.keys() - {PACKED_INDEX_NAME})
        for name in _index_names(source.config()):
            (output.folder / name).write_bytes(index_text(document))
        for name, content in made.items():
            bits = content if isinstance(content, bytes) else content(output.folder)
            (output.folder / name).write_bytes(bits)
        output.publish([*writes, *(layout.path.name for layout in layouts)])
    return PackReport(
        path=output.out,
        sizes=Sizes.of(layouts),
        resumed_shards=resumed,
        seconds=time.perf_counter() - began,
        converted_bytes=run.converted_bytes,
        left_out=companions.left_out,
        code=companions.code,
        recodable_tensors=len(recoded),
        neurons_unused=options.neurons.unused,
    )


def pack_writes(source: CheckpointSource) -> Writes:
    """Return what packing `source` writes besides shards, for `check_output`."""
    return _writes(find_companions(source), source.config())


def _writes(companions: Companions, config: Mapping[str, Any] | None) -> Writes:
    return planned_files(companions, config, *_index_names(config))


def _index_names(config: Mapping[str, Any] | None) -> tuple[str, ...]:
    """Return the names of the index: diffusers finds the shards by one of its own.

    It reads the config first, and refuses it unless Endor is there.
    """
    return (DIFFUSION_INDEX_NAME, PACKED_INDEX_NAME)[not is_diffusion(config) :]


@dataclass(frozen=True, slots=True)
class _Encoded:
    """A tensor ready to be written, and what gives its memory back."""

    encoded: Encoded
    release: Callable[[], None]


class _Run:
    """One conversion: how far it is, and how it goes on."""

    def __init__(
        self,
        source: CheckpointSource,
        output: OutputDirectory,
        units: Sequence[Unit],
        selected: frozenset[str],
        recoded: Layouts,
        pruner: WeightPruner | None,
        options: PackOptions,
        progress: Progress,
    ) -> None:
        self.output = output
        self.units = units
        self.selected = selected
        self.recoded = recoded
        self.options = options
        self.progress = progress
        self.part: Part | None = None
        self.done = 0
        self.done_bytes = 0
        self.total_bytes = sum(unit.nbytes for unit in units)
        self.converted_bytes = 0
        self.shards: list[Path] = []
        self.coded = source if isinstance(source, CodedSource) and pruner is None else None
        self.codes: dict[str, Codes] = {}
        self.sizes = RecordSizes(
            selected,
            recoded,
            options.codec,
            options.max_shard_bytes,
            coded=self.coded is not None,
            turned=options.neurons,
        )
        self.loader = TensorLoader(source, pruner, selected)
        self.scratches = ScratchPool(self.loader.budget_bytes)
        self.threads = 1

    def adopt_finished(self) -> None:
        """Check the shards of an earlier run and go on behind them."""
        for number, entry in enumerate(self.output.finished, start=1):
            path = self._adopt(number, entry)
            problems = check_file(path)
            layout = None if problems else FileLayout.read(path)
            if layout is None:
                raise CheckpointError(f"{problems[0]}; start again with --overwrite")
            names = list(layout.records)
            planned = [unit.name for unit in self.units[self.done : self.done + len(names)]]
            if names != planned or layout.checksum != entry.get("header"):
                raise CheckpointError(f"{path}: was changed; start again with --overwrite")
            self.shards.append(path)
            self.done_bytes += sum(unit.nbytes for unit in self.units[self.done :][: len(names)])
            self.done += len(names)
        self.progress(self.done_bytes, self.total_bytes)

    def _adopt(self, number: int, entry: Mapping[str, Any]) -> Path:
        """Return the shard that a line of the journal is about, under its name without a count."""
        folder = self.output.folder
        name = f"endor-{number:05d}.safetensors"
        if entry.get("file") != name:
            raise CheckpointError(
                f"{self.output.partial}: file {number} in the journal must be {name}, got "
                f"{entry.get('file')!r}; start again with --overwrite"
            )
        for renamed in sorted(folder.glob(f"endor-{number:05d}-of-*.safetensors")):
            if os.path.lexists(folder / name):
                raise CheckpointError(
                    f"{renamed}: is there beside {name}; start again with --overwrite"
                )
            renamed.rename(folder / name)
        return self.output.adopt(name)

    def write(self, threads: int) -> None:
        """Write all shards that are not there yet."""
        self.threads = threads
        work = OrderedWork(
            self._encode,
            lambda tensor: tensor.nbytes,
            threads=threads,
            budget_bytes=self.loader.budget_bytes,
            prepare=self._prepare,
        )
        tensors = [tensor for unit in self.units[self.done :] for tensor in unit.tensors]
        remote = fetching(self.loader.source)
        if remote is not None:
            remote.expect([tensor.name for tensor in tensors])
        with closing(work.run(tensors)) as results:
            try:
                while self.done < len(self.units):
                    self._write_shard(results)
            except BaseException:
                if remote is not None:
                    remote.cancel()  # or the workers would be waited for, and they for a download
                raise

    def _prepare(self, tensor: SourceTensor) -> None:
        """Read in order what a source with state demands so."""
        found = self.coded.coded(tensor.name) if self.coded and self.coded.ordered else None
        if found is None:
            self.loader.prepare(tensor)
        else:
            self.codes[tensor.name] = found

    def _encode(self, tensor: SourceTensor) -> _Encoded:
        done = self.part.encoded(tensor.name) if self.part is not None else None
        if done is not None:
            return _Encoded(done, lambda: None)
        found = self.codes.pop(tensor.name, None)
        if found is None and self.coded and not self.coded.ordered and tensor.name in self.selected:
            found = self.coded.coded(tensor.name)
        if found is not None:
            return _Encoded(encode_codes(found, tensor), lambda: None)
        loaded = self.loader.load(tensor)
        together = max(1, min(self.threads, self.loader.budget_bytes // max(tensor.nbytes, 1)))
        threads = max(1, self.threads // together)
        if tensor.name in self.recoded:
            smaller = recode(loaded.bits, tensor, self.recoded[tensor.name], threads=threads)
            if smaller is not None:
                self.loader.pool.give(loaded.buffer)
                return _Encoded(smaller, lambda: None)
        if tensor.dtype.bits:
            plain = dense.encode_as(loaded.bits, tensor.dtype, tensor.shape)
            return _Encoded(plain, lambda: self.loader.pool.give(loaded.buffer))
        scratch = self.scratches.take()
        neurons = self.options.neurons
        turn = partial(encode_turned, tensor.name, bundled=neurons.bundled)
        encoded = (turn if tensor.name in neurons.matrices else kernels.encode)(
            loaded.bits,
            tensor.dtype,
            codec=self.options.codec if tensor.name in self.selected else "dense",
            threads=threads,
            scratch=scratch,
        )
        if encoded.spec.codec == "dense":  # its array is the buffer
            self.scratches.give(scratch)
            return _Encoded(encoded, lambda: self.loader.pool.give(loaded.buffer))
        self.loader.pool.give(loaded.buffer)
        return _Encoded(encoded, lambda: self.scratches.give(scratch))

    def _write_shard(self, results: Iterator[tuple[SourceTensor, _Encoded]]) -> None:
        path = self.output.folder / f"endor-{len(self.shards) + 1:05d}.safetensors"
        capacity, count = self.sizes.header_room(self.units[self.done :])
        first = self.done
        with FileWriter(path, header_capacity=capacity) as writer:
            while self.done < first + count:
                unit = self.units[self.done]
                full = writer.nbytes + self.sizes.most(unit) > self.options.max_shard_bytes
                if full and self.done > first:
                    break
                with writer.record(unit.name) as record:
                    for tensor in unit.tensors:
                        found, result = next(results)
                        assert found is tensor
                        record.add(tensor.name, result.encoded)
                        result.release()
                        self.done_bytes += tensor.nbytes
                        self.converted_bytes += tensor.nbytes
                        self.progress(self.done_bytes, self.total_bytes)
                self.done += 1
        self.shards.append(path)
        # The header holds the checksums of all records, so its own stands for the whole file.
        header = FileLayout.read(path).checksum
        self.output.finish_file({"file": path.name, "header": header})

    def name_shards(self) -> list[FileLayout]:
        """Give the shards their final names and return their layouts."""
        layouts = []
        for number, path in enumerate(self.shards, start=1):
            target = path.with_name(shard_name(number, len(self.shards)))
            path.rename(target)
            layouts.append(FileLayout.read(target))
        return layouts
