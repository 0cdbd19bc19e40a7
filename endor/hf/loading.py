"""Opening the files of a packed checkpoint for a model, and what of them is loaded at once."""

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from endor import kernels
from endor.errors import CheckpointError
from endor.storage import (
    FileLayout,
    HostBuffer,
    Record,
    RecordReader,
    bind_checked,
    check_record,
)

_SHARD = re.compile(r"endor-(\d{5})-of-(\d{5})\.safetensors")


def open_layouts(paths: Sequence[str | Path]) -> list[FileLayout]:
    """Return the checked layout of each file, in order of shards.

    Raises:
        CheckpointError: A shard is missing, or two files hold the same tensor.
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


def check_records(layouts: Sequence[FileLayout], skip: set[str], reader: RecordReader) -> None:
    """Read and check every record but those in `skip`: what transformers loads by itself.

    Raises:
        ChecksumError: The bytes are damaged.
        FormatError: A tensor in them breaks the format.
    """
    for layout in layouts:
        for record in layout.records.values():
            if record.name in skip:
                continue
            buffer = HostBuffer(record.nbytes)
            reader.read(record, buffer)
            check_record(layout, record.name, buffer.array)


def expanded_file(layouts: Sequence[FileLayout], names: Sequence[str], reader: RecordReader) -> int:
    """Return a descriptor of a safetensors file in memory with the dense form of packed tensors.

    transformers loads it as one more shard, with all its renaming, casting and tying.

    Raises:
        FormatError: A tensor is damaged.
    """
    entries: dict[str, object] = {}
    found: list[tuple[FileLayout, Record, str]] = []
    at = 0
    for name in names:
        layout = next(layout for layout in layouts if name in layout.tensors)
        spec = layout.tensors[name].spec
        entries[name] = {
            "dtype": spec.dtype.name,
            "shape": list(spec.shape),
            "data_offsets": [at, at + spec.dense_nbytes],
        }
        at += spec.dense_nbytes
        found.append((layout, layout.record_of(name), name))
    header = json.dumps(entries).encode()
    header = header.ljust(-(-len(header) // 8) * 8)
    file = os.memfd_create("endor-expanded")
    try:
        with os.fdopen(os.dup(file), "wb") as out:
            out.write(len(header).to_bytes(8, "little") + header)
            for layout, record, name in found:
                buffer = HostBuffer(record.nbytes)
                reader.read(record, buffer)
                encoded = bind_checked(layout, name, buffer.array)
                dense = np.empty(encoded.spec.numel, dtype=encoded.spec.dtype.uint)
                out.write(kernels.decode(encoded, dense).data)
    except BaseException:
        os.close(file)
        raise
    return file
