"""Checks of whole files: every record, every structure, every coded stream."""

from collections.abc import Callable, Generator
from pathlib import Path

import numpy as np

from endor import kernels
from endor.codecs import Encoded
from endor.errors import FormatError
from endor.kernels.dispatch import select
from endor.storage.buffers import HostBuffer
from endor.storage.check import bind_checked, check_bytes
from endor.storage.layout import FileLayout, Record
from endor.storage.readers import RecordReader, open_reader

STREAM_ELEMENTS = 1 << 22
"""Elements of codec `int` that `check_stream` decodes at a time; whole chunks."""


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
