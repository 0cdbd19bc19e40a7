"""Any source to an ordinary Hugging Face checkpoint: unpacking, and pruning to dense.

Files are laid out like the source's, and inside a file as the safetensors library does it (element
types by falling size, then names), so an unpacked file equals, byte for byte, one that the library
wrote with the same tensors.
"""

import json
import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from endor import kernels
from endor.checkpoint.companions import Companions, copy_companions, find_companions, planned_files
from endor.checkpoint.directory import (
    DIFFUSION_INDEX_NAME,
    SAFETENSORS_INDEX_NAME,
    SAFETENSORS_NAME,
    is_diffusion,
)
from endor.checkpoint.index import DEFAULT_DENSE_FILE, dense_file_names
from endor.checkpoint.manifest import Writes
from endor.checkpoint.output import OutputDirectory
from endor.checkpoint.pipeline import OrderedWork
from endor.checkpoint.plan import plan_units
from endor.checkpoint.reading import Loaded, TensorLoader, WeightPruner
from endor.checkpoint.report import DenseReport, Progress, no_progress
from endor.checkpoint.sources.contract import CheckpointSource, SourceTensor
from endor.checkpoint.sources.gguf import HEAD, places_of
from endor.errors import CheckpointError, FormatError
from endor.storage import TemporaryFile
from endor.storage.positioned import write_at
from endor.storage.safetensors import Entry, file_head

DTYPE_ORDER = ["U64", "I64", "F64", "C64", "F32", "U32", "I32", "BF16", "F16", "U16", "I16"]
DTYPE_ORDER += ["F8_E5M2FNUZ", "F8_E4M3FNUZ", "F8_E8M0", "F8_E4M3", "F8_E5M2", "I8", "U8"]
DTYPE_ORDER += ["F6_E3M2", "F6_E2M3", "F4", "BOOL"]
"""How the safetensors library orders element types in a file."""

_CHECKSUM_BYTES = 1 << 20

MAX_OPEN_FILES = 64
"""Files that are being written and open; where shards interleave, more are being written."""


def write_dense(
    source: CheckpointSource,
    out: Path,
    *,
    selected: frozenset[str],
    pruner: WeightPruner | None,
    description: Mapping[str, Any],
    resume: bool = False,
    overwrite: bool = False,
    threads: int | None = None,
    progress: Progress | None = None,
) -> DenseReport:
    """Write `source`, pruned where selected, to `out` in dense form.

    Errors as for `pack_checkpoint`.
    """
    began = time.perf_counter()
    identity = {
        "kind": "dense",
        "source": source.fingerprint(),
        "selected": sorted(selected),
        "prune": dict(description),
    }
    config = source.config()
    names = dense_file_names(source.tensors.values())
    companions = find_companions(source)
    writes = _writes(companions, config, names)
    with OutputDirectory(
        out,
        identity=identity,
        source=source.path,
        writes=writes,
        resume=resume,
        overwrite=overwrite,
    ) as output:
        resumed = len(output.finished)
        run = _Run(source, output, names, selected, pruner, progress or no_progress)
        run.write(kernels.thread_count(threads))
        copy_companions(companions, output.folder, config)
        if _index_name(config) in writes:
            _write_index(output.folder / _index_name(config), list(source.tensors.values()), names)
        output.publish(writes.keys())
    return DenseReport(
        path=output.out,
        tensors=len(source.tensors),
        pruned_tensors=len(selected),
        weights=run.weights,
        zeros=run.zeros,
        dense_bytes=run.total_bytes,
        files=len(run.files),
        resumed_files=resumed,
        seconds=time.perf_counter() - began,
        left_out=companions.left_out,
        code=companions.code,
    )


def dense_writes(source: CheckpointSource) -> Writes:
    """Return what writing `source` in dense form writes, for `check_output`."""
    names = dense_file_names(source.tensors.values())
    return _writes(find_companions(source), source.config(), names)


def _writes(
    companions: Companions, config: Mapping[str, Any] | None, names: Mapping[str, str]
) -> Writes:
    files = sorted(set(names.values()))
    index = () if _is_whole(files) else (_index_name(config),)
    return planned_files(companions, config, *files, *index)


def _index_name(config: Mapping[str, Any] | None) -> str:
    """Return what the library that loads a checkpoint calls its index."""
    return DIFFUSION_INDEX_NAME if is_diffusion(config) else SAFETENSORS_INDEX_NAME


def _is_whole(files: Sequence[str]) -> bool:
    """Whether a checkpoint of these files needs no index: one file, whatever its name."""
    return files == [SAFETENSORS_NAME] or (len(files) == 1 and DEFAULT_DENSE_FILE not in files)


class _DenseFile:
    """One safetensors file whose tensors arrive in any order."""

    def __init__(self, path: Path, tensors: Sequence[SourceTensor]) -> None:
        self.path = path
        order = {name: place for place, name in enumerate(DTYPE_ORDER)}
        tensors = sorted(tensors, key=lambda tensor: (order[tensor.dtype.name], tensor.name))
        entries, end = [], 0
        for tensor in tensors:
            start, end = end, end + tensor.nbytes
            entries.append((tensor.name, Entry(tensor.dtype.name, tensor.shape, start, end)))
        self._head = file_head(entries)
        self.offsets = {name: len(self._head) + entry.start for name, entry in entries}
        self.nbytes = len(self._head) + end
        self.missing = set(self.offsets)
        self._temporary: TemporaryFile | None = None

    def put(self, name: str, data: memoryview) -> None:
        """Write one tensor at its place."""
        if self._temporary is None:
            self._temporary = TemporaryFile(self.path)
            write_at(self._temporary.fd, self._head, 0, self.path)
        self._temporary.resume()
        write_at(self._temporary.fd, data, self.offsets[name], self.path)
        self.missing.discard(name)

    def suspend(self) -> None:
        """Close the file until more of it comes."""
        if self._temporary is not None:
            self._temporary.suspend()

    def commit(self) -> None:
        """Give the file its name."""
        assert self._temporary is not None
        self._temporary.commit()

    def discard(self) -> None:
        """Remove what was not committed."""
        if self._temporary is not None:
            self._temporary.discard()


class _GgufFile(_DenseFile):
    """One GGUF file: each tensor where the head says."""

    def __init__(self, path: Path, tensors: Sequence[SourceTensor], head: bytes) -> None:
        self.path = path
        self._head = b""
        places = places_of(head, {tensor.name: tensor for tensor in tensors})
        self.offsets = {tensor.name: places[tensor.name] for tensor in tensors}
        self.missing = set(self.offsets)
        self._temporary: TemporaryFile | None = None


def _dense_file(
    source: CheckpointSource, path: Path, tensors: Sequence[SourceTensor]
) -> _DenseFile:
    """Return the file at `path` to be, of the format that its name says.

    Raises:
        FormatError: The head of a GGUF file is missing or does not describe the tensors.
    """
    if path.suffix != ".gguf":
        return _DenseFile(path, tensors)
    found = next((tensor for tensor in tensors if tensor.name == HEAD), None)
    if found is None:
        raise FormatError(f"{path.name}: {HEAD} is missing: there is no GGUF file without it")
    head = np.empty(found.nbytes, dtype=np.uint8)
    source.read_into(HEAD, head)
    return _GgufFile(path, tensors, head.tobytes())


class _Run:
    """One writing of a dense checkpoint."""

    def __init__(
        self,
        source: CheckpointSource,
        output: OutputDirectory,
        names: Mapping[str, str],
        selected: frozenset[str],
        pruner: WeightPruner | None,
        progress: Progress,
    ) -> None:
        self.source = source
        self.output = output
        self.names = names
        self.selected = selected
        self.progress = progress
        self.loader = TensorLoader(source, pruner, selected)
        self._open: OrderedDict[str, None] = OrderedDict()
        self.weights = self.zeros = self.done_bytes = 0
        self.total_bytes = sum(tensor.nbytes for tensor in source.tensors.values())
        members: dict[str, list[SourceTensor]] = {}
        for tensor in source.tensors.values():
            members.setdefault(names[tensor.name], []).append(tensor)
        self.files = {
            name: _dense_file(source, output.folder / name, tensors)
            for name, tensors in members.items()
        }

    def write(self, threads: int) -> None:
        """Write all files that are not there yet."""
        finished = self._adopt_finished()
        units = plan_units(self.source.tensors.values(), frozenset())
        tensors = [
            tensor
            for unit in units
            for tensor in unit.tensors
            if self.names[tensor.name] not in finished
        ]
        self.progress(self.done_bytes, self.total_bytes)
        work = OrderedWork(
            self._load,
            lambda tensor: tensor.nbytes,
            threads=threads,
            budget_bytes=self.loader.budget_bytes,
            prepare=self.loader.prepare,
        )
        try:
            with closing(work.run(tensors)) as results:
                for tensor, (loaded, zeros) in results:
                    self._put(tensor, loaded)
                    if tensor.name in self.selected:
                        self.weights += tensor.numel
                        self.zeros += zeros
        finally:
            for file in self.files.values():
                file.discard()

    def _load(self, tensor: SourceTensor) -> tuple[Loaded, int]:
        loaded = self.loader.load(tensor)
        counted = tensor.name in self.selected
        return loaded, tensor.numel - int(np.count_nonzero(loaded.bits)) if counted else 0

    def _put(self, tensor: SourceTensor, loaded: Loaded) -> None:
        name = self.names[tensor.name]
        file = self.files[name]
        file.put(tensor.name, loaded.buffer.array[: tensor.nbytes].data)
        self._open[name] = None
        self._open.move_to_end(name)
        if len(self._open) > MAX_OPEN_FILES:
            self.files[self._open.popitem(last=False)[0]].suspend()
        self.loader.pool.give(loaded.buffer)
        self.done_bytes += tensor.nbytes
        self.progress(self.done_bytes, self.total_bytes)
        if not file.missing:
            file.commit()
            del self._open[name]
            self.output.finish_file({"file": name, **_identity_of(file.path)})

    def _adopt_finished(self) -> set[str]:
        """Return the files of an earlier run, after checking them."""
        finished = set()
        for entry in self.output.finished:
            name = entry.get("file")
            if not isinstance(name, str) or name not in self.files:
                raise CheckpointError(
                    f"{self.output.partial}: the journal names {name!r}, which is no file of this "
                    "checkpoint; start again with --overwrite"
                )
            path = self.output.adopt(name)
            if _identity_of(path) != {key: entry.get(key) for key in ("bytes", "xxh3_64")}:
                raise CheckpointError(f"{path}: was changed; start again with --overwrite")
            finished.add(name)
            self.done_bytes += sum(
                tensor.nbytes
                for tensor in self.source.tensors.values()
                if self.names[tensor.name] == name
            )
        return finished


def _identity_of(path: Path) -> dict[str, Any]:
    """Return what the journal holds of a finished file: these have no checksums of their own."""
    return {"bytes": path.stat().st_size, "xxh3_64": _file_checksum(path)}


def _file_checksum(path: Path) -> str:
    digest = xxhash.xxh3_64()
    with path.open("rb", buffering=0) as file:
        while piece := file.read(_CHECKSUM_BYTES):
            digest.update(piece)
    return str(digest.hexdigest())


def _write_index(path: Path, tensors: Sequence[SourceTensor], names: Mapping[str, str]) -> None:
    tensors = sorted(tensors, key=lambda tensor: tensor.name)
    document = {
        "metadata": {"total_size": sum(tensor.nbytes for tensor in tensors)},
        "weight_map": {tensor.name: names[tensor.name] for tensor in tensors},
    }
    text = json.dumps(document, indent=2, ensure_ascii=False) + "\n"
    path.write_text(text, encoding="utf-8")
