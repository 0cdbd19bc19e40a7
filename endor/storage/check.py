"""Checks of content: after these, a damaged or hostile file cannot reach a kernel."""

from collections.abc import Callable, Generator
from pathlib import Path

import numpy as np

from endor import codecs, kernels
from endor.codecs import Encoded
from endor.errors import ChecksumError, FormatError, IntegrityError
from endor.kernels.dispatch import select
from endor.storage.buffers import HostBuffer
from endor.storage.checksum import checksum
from endor.storage.layout import FileLayout, Record
from endor.storage.readers import RecordReader, open_reader

STREAM_ELEMENTS = 1 << 22
"""Elements of codec `int` that `check_stream` decodes at a time; whole chunks."""


def check_bytes(record: Record, record_bytes: np.ndarray) -> None:
    """Raise unless the bytes of a record match its checksum and its pads are zero.

    Args:
        record: From the file's layout.
        record_bytes: u8, flat; bytes past the record's length are ignored.

    Raises:
        ChecksumError: The checksum differs.
        FormatError: A pad holds something.
    """
    where = f"{record.path}: record {record.name!r} at offset {record.offset}"
    found = checksum(record_bytes[: record.nbytes].data)
    if found != record.checksum:
        raise ChecksumError(
            f"{where}: checksum must be {record.checksum}, got {found}; its {record.nbytes} bytes "
            "are damaged: copy or convert the file again"
        )
    for start, stop in record.pads:
        if record_bytes[start:stop].any():
            raise FormatError(f"{where}: bytes {start}:{stop} are a pad and must be 0")


def check_again(record: Record, record_bytes: np.ndarray) -> None:
    """Check the checksum and pads of a record whose bytes were found right before.

    Raises:
        IntegrityError: They are others now.
    """
    try:
        check_bytes(record, record_bytes)
    except FormatError as error:
        raise IntegrityError(
            f"{record.path}: record {record.name!r} changed since it was first read; something "
            f"writes to the file: load the model again ({error})"
        ) from error


def bind_checked(layout: FileLayout, name: str, record_bytes: np.ndarray) -> Encoded:
    """Return the tensor `name` as views into its record, after checking its structure.

    Raises:
        FormatError: The arrays contradict each other.
        CheckpointError, ShapeError: As `FileLayout.bind`.
    """
    encoded = layout.bind(name, record_bytes)
    try:
        codecs.validate(encoded)
    except FormatError as error:
        raise FormatError(f"{layout.path}: {name}: {error}") from None
    return encoded


def check_stream(layout: FileLayout, name: str, encoded: Encoded) -> None:
    """Decode a coded tensor (`int`, `fields`): its structure does not say if its words are right.

    Args:
        layout: The file.
        name: The tensor.
        encoded: From `bind_checked`; of another codec, nothing is done.

    Raises:
        FormatError: A chunk does not end as its coders began.
    """
    spec = encoded.spec
    if spec.codec not in ("int", "fields") or not spec.units:
        return
    # The reference decodes the whole tensor whatever the range.
    step = spec.units if select(None) is None else min(STREAM_ELEMENTS, spec.units)
    out = np.empty(step, dtype=spec.dtype.uint)
    try:
        for start in range(0, spec.units, step):
            stop = min(start + step, spec.units)
            kernels.decode(encoded, out, start=start, stop=stop, threads=1)
    except FormatError as error:
        raise FormatError(f"{layout.path}: {name}: {error}") from None


def check_record(layout: FileLayout, name: str, record_bytes: np.ndarray) -> None:
    """Check the checksum, pads and every tensor of the record `name`.

    Raises:
        ChecksumError: The bytes are damaged.
        FormatError: The bytes are as they were written, and break the format.
    """
    record = layout.records[name]
    check_bytes(record, record_bytes)
    for tensor in record.tensors:
        bind_checked(layout, tensor, record_bytes)


def read_records(
    layout: FileLayout, reader: RecordReader
) -> Generator[tuple[Record, np.ndarray], None, None]:
    """Yield every record of a file with its bytes, in file order, one read ahead.

    Yields:
        The record and its bytes, not checked, valid until the next step.
    """
    records = list(layout.records.values())
    largest = max((record.nbytes for record in records), default=0)
    buffers = [HostBuffer(largest) for _ in range(min(2, len(records)))]
    tickets = [reader.submit(record, buffers[0]) for record in records[:1]]
    try:
        for at, record in enumerate(records):
            reader.wait(tickets[at])
            if at + 1 < len(records):
                tickets.append(reader.submit(records[at + 1], buffers[(at + 1) % 2]))
            yield record, buffers[at % 2].array[: record.nbytes]
    finally:
        if tickets:
            tickets[-1].settle()


def verify_file(
    path: Path | str,
    *,
    reader: RecordReader | None = None,
    progress: Callable[[int], None] | None = None,
) -> FileLayout:
    """Check everything in a packed file: header, checksums, pads, structures, coded streams.

    Args:
        path: The file.
        reader: Reads it; a new one when omitted.
        progress: Called with the bytes of each record that passed.

    Returns:
        The layout of the file, which is whole.

    Raises:
        FormatError: The file is damaged; see its subclasses.
        ReadError, OSError: The file cannot be read.
    """
    layout = FileLayout.read(path)
    if reader is None:
        with open_reader() as own:
            return verify_file(path, reader=own, progress=progress)
    for record, record_bytes in read_records(layout, reader):
        check_bytes(record, record_bytes)
        for tensor in record.tensors:
            check_stream(layout, tensor, bind_checked(layout, tensor, record_bytes))
        if progress is not None:
            progress(record.nbytes)
    return layout
