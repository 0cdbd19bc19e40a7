"""Is a packed checkpoint whole: checksums, structure, index, and equality with a dense one."""

import math
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from endor import kernels
from endor.checkpoint.companions import QUANTIZATION_KEY
from endor.checkpoint.directory import PACKED_INDEX_NAME, read_config
from endor.checkpoint.index import (
    PackedIndex,
    build_index,
    check_shards,
    index_text,
    read_packed_index,
    shard_name,
)
from endor.checkpoint.neuron_counts import read_neuron_counts
from endor.checkpoint.open import open_source
from endor.checkpoint.pipeline import MIN_BUDGET_BYTES, BufferPool, OrderedWork
from endor.checkpoint.predictors import read_predictors
from endor.checkpoint.report import Progress, no_progress
from endor.checkpoint.sources.contract import CheckpointSource
from endor.checkpoint.sources.dequantized import DequantizedSource
from endor.codecs import DType
from endor.codecs.rounding import floats_of
from endor.errors import EndorError
from endor.storage import (
    FileLayout,
    Record,
    RecordReader,
    bind_checked,
    check_bytes,
    check_stream,
    open_reader,
)


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """What `verify_checkpoint` found.

    Attributes:
        path: The packed checkpoint.
        problems: One line each; empty when all is well.
        files: Shards looked at.
        tensors: Tensors in them.
        nbytes: Packed bytes read.
        compared: Tensors compared with the dense checkpoint.
        lossy: Those of them that are quantised and not equal, as quantised ones may be.
        weight_error: Geometric mean over these of the squared change over the squared weights; None
            when there are none.
        output_error: The same of their outputs on the calibration text, as packing recorded it.
    """

    path: Path
    problems: tuple[str, ...]
    files: int
    tensors: int
    nbytes: int
    compared: int
    lossy: int = 0
    weight_error: float | None = None
    output_error: float | None = None

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems


def verify_checkpoint(
    packed_dir: Path | str,
    *,
    against: Path | str | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
) -> VerifyReport:
    """Return what is wrong with a packed checkpoint; damage is reported, not raised.

    Args:
        packed_dir: The packed checkpoint.
        against: A dense or packed checkpoint whose tensors must equal these bit for bit; quantised
            ones must be nearer to it than nothing at all.
        threads: Workers; every CPU when omitted.
        progress: Called with packed bytes done and in total.

    Raises:
        CheckpointError: `packed_dir` is no packed checkpoint, or `against` cannot be read.
        OSError: a file cannot be read.
    """
    path = Path(packed_dir)
    problems: list[str] = []
    try:
        index: PackedIndex | None = read_packed_index(path)
    except EndorError as error:
        if not (path / PACKED_INDEX_NAME).exists():
            raise
        problems.append(str(error))
        index = None
    found = sorted(file.name for file in path.glob("endor-*.safetensors"))
    files = index.files if index else tuple(found)
    layouts: list[FileLayout] = []
    for file in files:
        try:
            layouts.append(FileLayout.read(path / file))
        except EndorError as error:
            problems.append(str(error))
    if index and len(layouts) == len(files):
        problems += _check_index(path, index, layouts)
    reference = _reference(path, against) if against is not None else None
    try:
        check = _ContentCheck(layouts, reference, kernels.thread_count(threads))
        problems += check.run(progress or no_progress)
    finally:
        if reference is not None:
            reference.close()
    return VerifyReport(
        path=path,
        problems=tuple(problems),
        files=len(files),
        tensors=sum(len(layout.tensors) for layout in layouts),
        nbytes=sum(layout.file_bytes for layout in layouts),
        compared=check.compared,
        lossy=len(check.changes),
        weight_error=check.weight_error,
        output_error=_recorded_error(path) if check.changes else None,
    )


def _reference(path: Path, against: Path | str) -> CheckpointSource:
    """Return what to compare with: dequantised, where that is what was packed."""
    source = open_source(against)
    if _said(path, "dequantized") and (source.config() or {}).get(QUANTIZATION_KEY):
        return DequantizedSource(source)
    return source


def _recorded_error(path: Path) -> float | None:
    """Return the relative output error that a quantising run left in config.json."""
    found = _said(path, "quantize", "output_error")
    return found if isinstance(found, float) else None


def _said(path: Path, *keys: str) -> Any:
    """Return what config.json says of the packing; None where it says nothing."""
    found: Any = read_config(path)
    for key in (QUANTIZATION_KEY, *keys):
        found = found.get(key) if isinstance(found, Mapping) else None
    return found


def check_file(path: Path) -> list[str]:
    """Return what is wrong with one packed file."""
    try:
        layout = FileLayout.read(path)
    except (EndorError, FileNotFoundError) as error:
        return [str(error)]
    return _ContentCheck([layout], None, kernels.thread_count(None)).run(no_progress)


def _check_index(path: Path, index: PackedIndex, layouts: list[FileLayout]) -> Iterator[str]:
    where = path / PACKED_INDEX_NAME
    names = [shard_name(number, len(layouts)) for number in range(1, len(layouts) + 1)]
    if list(index.files) != names:
        yield f"{where}: shards must be {names[0]} to {names[-1]}, got {', '.join(index.files)}"
    strays = {file.name for file in path.glob("endor-*.safetensors")} - set(index.files)
    for stray in sorted(strays):
        yield f"{path / stray}: is not in the index; remove it"
    stored = [name for layout in layouts for name in layout.tensors]
    if len(set(stored)) != len(stored):
        twice = min(name for name in stored if stored.count(name) > 1)
        yield f"{path}: {twice} is in more than one shard"
    elif set(stored) != set(index.dense_files):
        odd = min(set(stored) ^ set(index.dense_files))
        yield f"{where}: {odd} must be both in the index and in a shard"
    else:
        try:
            check_shards(path, index, layouts)
        except EndorError as error:
            yield str(error)
            return
        for read in (read_neuron_counts, read_predictors):
            try:
                read(path, layouts)
            except EndorError as error:
                yield str(error)
        document = build_index(layouts, index.dense_files, index.companions)
        if index_text(document) != where.read_bytes():
            yield f"{where}: does not describe the shards; restore or re-make the checkpoint"


@dataclass(slots=True)
class _Checked:
    """What is known of one record: problems, tensors compared, changes of quantised ones."""

    problems: list[str] = field(default_factory=list)
    compared: int = 0
    changes: list[float] = field(default_factory=list)


def _relative_change(bits: np.ndarray, expected: np.ndarray, dtype: DType) -> float:
    """Return the squared distance of two tensors over the squared length of the second."""
    ours, theirs = (floats_of(part, dtype).astype(np.float64) for part in (bits, expected))
    whole = float(np.square(theirs).sum())
    return float(np.square(ours - theirs).sum()) / whole if whole > 0 else math.inf


class _ContentCheck:
    """Reads every record once; checks it, and compares its tensors when there is a reference."""

    def __init__(
        self, layouts: list[FileLayout], reference: CheckpointSource | None, threads: int
    ) -> None:
        self.layouts = layouts
        self.reference = reference
        self.threads = threads
        self.compared = 0
        self.changes: list[float] = []
        records = [record for layout in layouts for record in layout.records.values()]
        self.total = sum(record.nbytes for record in records)
        self.budget = max([record.nbytes for record in records] + [MIN_BUDGET_BYTES])
        self.pool = BufferPool(self.budget)

    def run(self, progress: Progress) -> list[str]:
        problems = list(self._missing())
        tasks = [(layout, record) for layout in self.layouts for record in layout.records.values()]
        done = 0
        progress(done, self.total)
        with open_reader() as reader:
            work: OrderedWork[tuple[FileLayout, Record], _Checked] = OrderedWork(
                lambda task: self._check(task[0], task[1], reader),
                lambda task: task[1].nbytes,
                threads=self.threads,
                budget_bytes=self.budget,
            )
            with closing(work.run(tasks)) as results:
                for (_, record), found in results:
                    problems += found.problems
                    self.compared += found.compared
                    self.changes += found.changes
                    done += record.nbytes
                    progress(done, self.total)
        return problems

    def _missing(self) -> Iterator[str]:
        if self.reference is None:
            return
        ours = {name for layout in self.layouts for name in layout.tensors}
        for name in sorted(self.reference.tensors.keys() - ours):
            yield f"{name}: is in {self.reference.path} and not in the packed checkpoint"

    @property
    def weight_error(self) -> float | None:
        """The geometric mean of the changes."""
        if not self.changes:
            return None
        return math.exp(sum(map(math.log, self.changes)) / len(self.changes))

    def _check(self, layout: FileLayout, record: Record, reader: RecordReader) -> "_Checked":
        buffer = self.pool.take(record.nbytes)
        checked = _Checked()
        try:
            reader.read(record, buffer)
            check_bytes(record, buffer.array)
        except EndorError as error:
            self.pool.give(buffer)
            return _Checked([str(error)])
        for name in record.tensors:
            try:
                encoded = bind_checked(layout, name, buffer.array)
                if self.reference is None:
                    check_stream(layout, name, encoded)
                else:
                    out = np.empty(encoded.spec.units, dtype=encoded.spec.dtype.uint)
                    kernels.decode(encoded, out, threads=1)
                    checked.problems += self._compare(layout, name, out, checked.changes)
                    checked.compared += 1
            except EndorError as error:
                checked.problems.append(str(error))
        self.pool.give(buffer)
        return checked

    def _compare(
        self, layout: FileLayout, name: str, bits: np.ndarray, changes: list[float]
    ) -> Iterator[str]:
        assert self.reference is not None
        spec = layout.tensors[name].spec
        tensor = self.reference.tensors.get(name)
        if tensor is None:
            yield f"{name}: is not in {self.reference.path}"
            return
        if (tensor.dtype, tensor.shape) != (spec.dtype, spec.shape):
            yield (
                f"{name}: is {spec.dtype.name} {list(spec.shape)}, and "
                f"{tensor.dtype.name} {list(tensor.shape)} in {self.reference.path}"
            )
            return
        expected = np.empty(tensor.nbytes, dtype=np.uint8)
        self.reference.read_into(name, expected)
        wrong = np.flatnonzero(bits != expected.view(bits.dtype))
        if wrong.size and spec.codec == "int":
            change = _relative_change(bits, expected.view(bits.dtype), spec.dtype)
            if change < 1:
                changes.append(change)
                return
        if wrong.size:
            first = int(wrong[0])
            shape = spec.dtype.unit_shape(spec.shape)
            place = tuple(int(i) for i in np.unravel_index(first, shape)) if shape else ()
            digits = 2 * spec.dtype.itemsize
            yield (
                f"{name}: {wrong.size} of {bits.size} elements differ from {self.reference.path}; "
                f"the first at {place} is 0x{int(bits[first]):0{digits}x}, there "
                f"0x{int(expected.view(bits.dtype)[first]):0{digits}x}"
            )
