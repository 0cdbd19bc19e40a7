"""Opening the files of a packed checkpoint, and handing transformers what is not packed."""

import json
import os
import re
import shutil
import tempfile
import weakref
from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np

from endor import kernels
from endor.checkpoint.index import check_together
from endor.errors import CheckpointError
from endor.storage import (
    FileLayout,
    HostBuffer,
    RecordReader,
    TensorEntry,
    align_up,
    bind_checked,
    check_record,
)

_PLAIN_ALIGN = 64
"""Alignment of tensors that transformers maps; torch's products vary below 16 bytes."""

_SHARD = re.compile(r"endor-(\d{5})-of-(\d{5})\.safetensors")


def open_layouts(paths: Sequence[str | Path]) -> list[FileLayout]:
    """Return the checked layout of each file, in order of shards.

    Raises:
        CheckpointError: A shard is missing, or two files hold the same tensor.
        ChecksumError: A shard is not the one that the index beside it was written for.
        FormatError: A file is damaged, truncated or no packed file.
    """
    files = sorted({Path(path) for path in paths}, key=lambda path: path.name)
    for path in files:
        match = _SHARD.fullmatch(path.name)
        if match and int(match[2]) != len(files):
            raise CheckpointError(
                f"{path}: one of {int(match[2])} shards, but the index names {len(files)}; "
                "copy the checkpoint again"
            )
    layouts = [FileLayout.read(path) for path in files]
    check_together(layouts)
    seen: dict[str, Path] = {}
    for layout in layouts:
        for name in layout.tensors:
            if name in seen:
                raise CheckpointError(
                    f"{layout.path}: tensor {name} is in {seen[name].name} too; "
                    "copy or convert the checkpoint again"
                )
            seen[name] = layout.path
    return layouts


class PlainFile:
    """A safetensors file in memory that transformers loads in place of the packed ones.

    Attributes:
        path: Its name, until it is closed; it closes itself when it is forgotten.
    """

    def __init__(self, descriptor: int) -> None:
        """Own `descriptor`, and give it a name that transformers takes for a safetensors file."""
        folder = Path(tempfile.mkdtemp(prefix="endor-"))
        self.path = str(folder / "plain.safetensors")
        self._finish = weakref.finalize(self, _remove, folder, descriptor)
        Path(self.path).symlink_to(f"/proc/self/fd/{descriptor}")

    def close(self) -> None:
        """Give up the file; what was mapped of it stays until it is no longer used."""
        self._finish()


def _remove(folder: Path, descriptor: int) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    os.close(descriptor)


def plain_file(
    layouts: Sequence[FileLayout], skip: Collection[str], reader: RecordReader, *, verify: bool
) -> PlainFile:
    """Return a file with the dense form of every tensor but those in `skip`.

    transformers maps what it loads: left to the packed files, a parameter would kill the process
    with a bus error, or silently change, when its file does. From here it gets bytes that were
    checked, that nothing can change, and that are aligned; each is in memory once.

    Args:
        layouts: The checkpoint's files.
        skip: Tensors that stay packed.
        reader: Reads the records.
        verify: Check each record that is read.

    Raises:
        ChecksumError: A record is damaged.
        FormatError: A tensor breaks the format.
        ReadError: A record cannot be read.
    """
    wanted = [
        (layout, entry)
        for layout in layouts
        for entry in layout.tensors.values()
        if entry.name not in skip
    ]
    header, starts = _plain_header([entry for _, entry in wanted])
    file = os.memfd_create("endor-plain")
    try:
        _write_all(file, header, 0)
        held: tuple[FileLayout, str, np.ndarray] | None = None
        for (layout, entry), start in zip(wanted, starts, strict=True):
            if held is None or (held[0] is not layout or held[1] != entry.record):
                record = layout.records[entry.record]
                buffer = HostBuffer(record.nbytes)
                reader.read(record, buffer)
                if verify:
                    check_record(layout, record.name, buffer.array)
                held = (layout, entry.record, buffer.array)
            encoded = bind_checked(layout, entry.name, held[2])
            dense = np.empty(entry.spec.numel, dtype=entry.spec.dtype.uint)
            kernels.decode(encoded, dense)
            _write_all(file, dense.data.cast("B"), len(header) + start)
        os.ftruncate(file, len(header) + (starts[-1] + _padded(wanted[-1][1]) if wanted else 0))
    except BaseException:
        os.close(file)
        raise
    return PlainFile(file)


def _plain_header(entries: Sequence[TensorEntry]) -> tuple[bytes, list[int]]:
    """Return the header of a file with `entries`, aligned, and where the data of each starts."""
    fields: dict[str, object] = {"__metadata__": {"format": "pt"}}
    starts, at = [], 0
    for number, entry in enumerate(entries):
        spec = entry.spec
        stop, padded = at + spec.dense_nbytes, at + _padded(entry)
        fields[entry.name] = {
            "dtype": spec.dtype.name,
            "shape": list(spec.shape),
            "data_offsets": [at, stop],
        }
        if padded > stop:
            fields[f"__pad__.{number}"] = {
                "dtype": "U8",
                "shape": [padded - stop],
                "data_offsets": [stop, padded],
            }
        starts.append(at)
        at = padded
    text = json.dumps(fields).encode()
    text = text.ljust(align_up(8 + len(text), _PLAIN_ALIGN) - 8)
    return len(text).to_bytes(8, "little") + text, starts


def _padded(entry: TensorEntry) -> int:
    return align_up(entry.spec.dense_nbytes, _PLAIN_ALIGN)


def _write_all(file: int, data: bytes | memoryview, offset: int) -> None:
    view = memoryview(data)
    while view:
        done = os.pwrite(file, view, offset)
        view, offset = view[done:], offset + done
