"""Writing packed files: record after record to disk, the header last, and only then the name."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from endor.codecs import DType, Encoded, TensorSpec
from endor.codecs.coding import (
    LANES,
    MAX_CODE,
    MAX_SHIFT,
    MAX_SYMBOLS,
    MAX_WORDS,
    Coding,
    matrix_shape,
)
from endor.errors import FormatError, ShapeError
from endor.storage.checksum import DIGITS, Digest
from endor.storage.layout import (
    ALIGN,
    ARRAY_ALIGN,
    FORMAT_VERSION,
    TAIL_BYTES,
    FileLayout,
    align_up,
    array_key,
    version_of,
)
from endor.storage.safetensors import MAX_HEADER_BYTES, METADATA_KEY, PREFIX_BYTES, Entry
from endor.storage.seal import PAD_PREFIX, RESERVED_METADATA, finish, seal
from endor.storage.sink import Sink
from endor.storage.temporary import TemporaryFile


def largest_spec(shape: tuple[int, ...], dtype: DType) -> TensorSpec:
    """Return a spec whose header is at least as long as that of any stored form of the tensor."""
    numel = math.prod(shape)
    if not dtype.packable:
        return TensorSpec(shape, dtype, "dense", bitmap=False, nnz=numel)
    return TensorSpec(shape, dtype, "exp", bitmap=True, nnz=numel, k=8, base=255, patches=numel)


def largest_int_spec(
    shape: tuple[int, ...], dtype: DType, step_block: tuple[int, int] | None = None
) -> TensorSpec:
    """Return a spec whose header is at least as long as that of the tensor in codec `int`.

    Every field is as long as it can be, so that together they describe no tensor.

    Args:
        shape: Dense shape.
        dtype: Dense element type.
        step_block: Rows and columns that share a step; None is a step a column.
    """
    numel = math.prod(shape)
    block = step_block or (max(matrix_shape(shape)[0], 1), 1)
    words = min(-(-numel // LANES) * LANES, MAX_WORDS)
    coding = Coding(-MAX_CODE, MAX_SYMBOLS, MAX_SHIFT, words, "BF16", -100, block)
    return TensorSpec(shape, dtype, "int", False, numel, patches=numel, coding=coding)


def header_capacity(
    plan: Mapping[str, Mapping[str, TensorSpec]], metadata: Mapping[str, str] | None = None
) -> int:
    """Return bytes that suffice for the header of a file, whatever its tensors turn out to be.

    Depends on the arguments only, so that equal input gives equal files.

    Args:
        plan: Per record the tensors it will hold, each with its spec, or with `largest_spec` where
            the stored form is not known yet.
        metadata: What `FileWriter` will get.
    """
    specs = [(name, spec) for tensors in plan.values() for name, spec in tensors.items()]
    arrays = [(name, array) for name, spec in specs for array in spec.arrays]
    size = sum(array.nbytes + ARRAY_ALIGN for _, array in arrays)
    size += len(plan) * 2 * ALIGN + len(arrays) * 1024
    widest = int("9" * len(str(size)))
    book = _Book(metadata or {})
    for record, tensors in plan.items():
        book.records[record] = [widest, widest, "0" * DIGITS]
        for name, spec in tensors.items():
            book.tensors[name] = spec.to_dict() | {"record": record}
    for name, array in arrays:
        entry = Entry(array.dtype.name, array.shape, widest, widest)
        book.entries.append((array_key(name, array.suffix), entry))
        book.add_pad(Entry("U8", (2 * ALIGN,), widest, widest))
    return PREFIX_BYTES + len(book.header())


class FileWriter:
    """Writes one packed file; a context manager.

    The file gets its name when the context ends well, after it was flushed to the disk and read
    back by the safetensors library; an existing file is replaced in that moment. An exception
    removes all traces, and a killed process leaves only a file that `remove_stale_temporaries`
    knows. Equal calls give equal bytes. For one thread at a time.

        with FileWriter(path, header_capacity=header_capacity(plan)) as writer:
            with writer.record("model.layers.0.mlp.up_proj") as record:
                record.add("model.layers.0.mlp.up_proj.weight", encoded)

    Args:
        path: The file; its directory must exist.
        header_capacity: Bytes kept free for the header, from the function of that name.
        metadata: Strings for the file's `__metadata__`.

    Raises:
        FormatError: Names collide, or the header outgrows its room.
        ShapeError: An array contradicts its spec.
        OSError: From the file system, naming the file.
    """

    def __init__(
        self, path: Path | str, *, header_capacity: int, metadata: Mapping[str, str] | None = None
    ) -> None:
        self.path = Path(path)
        taken = RESERVED_METADATA.intersection(metadata or {})
        if taken:
            raise FormatError(f"{path}: metadata {min(taken)!r} is reserved; use another key")
        self._data_start = align_up(max(header_capacity, 1), ALIGN)
        if self._data_start > MAX_HEADER_BYTES:
            raise FormatError(
                f"{path}: the header must stay below {MAX_HEADER_BYTES} bytes, got "
                f"{header_capacity}; put the tensors into more files"
            )
        self._book = _Book(dict(metadata or {}))
        self._keys: set[str] = set()
        self._open_record: str | None = None
        self._temporary: TemporaryFile | None = None
        self._sink: Sink | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the file so far, header included."""
        return self._sink.position if self._sink else self._data_start

    def __enter__(self) -> Self:
        self._temporary = TemporaryFile(self.path)
        self._sink = Sink(self._temporary.fd, self.path, self._data_start)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self._temporary is not None
        temporary, self._temporary = self._temporary, None
        try:
            if kind is None:
                self._commit(temporary)
        finally:
            self._sink = None
            temporary.discard()

    @contextmanager
    def record(self, name: str) -> Iterator["RecordWriter"]:
        """Write one record: the context's value takes its tensors, in file order."""
        if self._sink is None:
            raise FormatError(f"{self.path}: is closed; write records inside the `with` block")
        if self._open_record is not None:
            raise FormatError(f"{self.path}: record {self._open_record!r} was not finished")
        if name in self._book.records:
            raise FormatError(f"{self.path}: record {name!r} is written twice; rename one")
        self._open_record = name
        record = RecordWriter(self, name, self._sink)
        yield record
        record._finish()
        self._open_record = None

    def _commit(self, temporary: TemporaryFile) -> None:
        assert self._sink is not None
        if self._open_record is not None:
            raise FormatError(f"{self.path}: record {self._open_record!r} was not finished")
        self._sink.flush()
        blank = self._book.header()
        if PREFIX_BYTES + len(blank) > self._data_start:
            raise FormatError(
                f"{self.path}: the header needs {PREFIX_BYTES + len(blank)} bytes and "
                f"{self._data_start} were reserved; plan for all tensors in header_capacity"
            )
        self._sink.write_at(memoryview(finish(blank, self._data_start)), 0)
        _check_readable(temporary.path, {key for key, _ in self._book.entries})
        temporary.commit()


class RecordWriter:
    """Takes the tensors of one record; made by `FileWriter.record`."""

    def __init__(self, writer: FileWriter, name: str, sink: Sink) -> None:
        self._writer = writer
        self._book = writer._book
        self._name = name
        self._sink = sink
        self._start = sink.position
        self._digest = Digest()
        self._tensors = 0

    def add(self, name: str, encoded: Encoded) -> None:
        """Append the tensor `name`; its arrays are on their way to the disk when this returns."""
        keys = {array_key(name, array.suffix) for array in encoded.spec.arrays}
        taken = keys & self._writer._keys
        if name in self._book.tensors or taken:
            raise FormatError(
                f"{self._writer.path}: {name}: array {min(taken, default=name)!r} exists already; "
                "rename one of the tensors"
            )
        if name == METADATA_KEY or name.startswith(PAD_PREFIX) or "\0" in name:
            raise FormatError(f"{self._writer.path}: {name!r} is no name to use; rename the tensor")
        for array in encoded.spec.arrays:
            found = encoded.arrays[array.suffix]
            if found.shape != array.unit_shape or found.dtype != array.dtype.uint:
                raise ShapeError(
                    f"{array_key(name, array.suffix)}: must be {array.dtype.uint} "
                    f"{array.unit_shape} by its spec, got {found.dtype} {found.shape}"
                )
        self._writer._keys |= keys
        self._book.tensors[name] = encoded.spec.to_dict() | {"record": self._name}
        self._book.version = max(self._book.version, version_of([encoded.spec]))
        self._tensors += 1
        for array in encoded.spec.arrays:
            self._pad(align_up(self._sink.position, ARRAY_ALIGN))
            data = np.ascontiguousarray(encoded.arrays[array.suffix])
            start = self._sink.position - self._writer._data_start
            entry = Entry(array.dtype.name, array.shape, start, start + array.nbytes)
            self._book.entries.append((array_key(name, array.suffix), entry))
            self._append(data.reshape(-1).view(np.uint8).data)

    def _append(self, data: memoryview) -> None:
        self._digest.update(data)
        self._sink.append(data)

    def _pad(self, position: int) -> None:
        here = self._sink.position
        if position > here:
            start = here - self._writer._data_start
            stop = position - self._writer._data_start
            self._book.add_pad(Entry("U8", (stop - start,), start, stop))
            self._append(memoryview(bytes(position - here)))

    def _finish(self) -> None:
        if not self._tensors:
            raise FormatError(f"{self._writer.path}: record {self._name!r} must hold a tensor")
        self._pad(align_up(self._sink.position + TAIL_BYTES, ALIGN))
        nbytes = self._sink.position - self._start
        self._book.records[self._name] = [self._start, nbytes, self._digest.hexdigest()]


class _Book:
    """What the header will say."""

    def __init__(self, metadata: Mapping[str, str]) -> None:
        self.metadata = metadata
        self.entries: list[tuple[str, Entry]] = []
        self.tensors: dict[str, dict[str, Any]] = {}
        self.records: dict[str, list[Any]] = {}
        self.pads: list[str] = []
        self.version = FORMAT_VERSION

    def add_pad(self, entry: Entry) -> None:
        key = f"{PAD_PREFIX}{len(self.pads)}"
        self.pads.append(key)
        self.entries.append((key, entry))

    def header(self) -> bytes:
        """Return the header JSON, without its checksum and padding."""
        directory = {
            "version": self.version,
            "align": ALIGN,
            "tensors": self.tensors,
            "records": self.records,
            "pads": self.pads,
        }
        return seal(self.entries, directory, self.metadata)


def _check_readable(path: Path, keys: set[str]) -> None:
    """Raise unless this library and the safetensors library both accept the file."""
    from safetensors import SafetensorError, safe_open

    FileLayout.read(path)
    try:
        with safe_open(path, framework="np") as file:
            found = set(file.keys())
    except SafetensorError as error:
        raise FormatError(f"{path}: safetensors must read the file: {error}") from None
    if found != keys:
        raise FormatError(f"{path}: safetensors must see {len(keys)} arrays, got {len(found)}")
