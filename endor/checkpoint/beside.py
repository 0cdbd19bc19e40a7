"""Stock safetensors files beside the shards of a packed checkpoint, which say something of them.

What such a file says of a matrix holds for the record that the matrix lies in: it names that
record's checksum, and has a checksum of its own.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from endor.checkpoint.directory import PACKED_INDEX_NAME
from endor.checkpoint.index import published_files
from endor.errors import CheckpointError, ChecksumError, FormatError
from endor.jsontext import parse_object
from endor.storage import FileLayout
from endor.storage.checksum import checksum
from endor.storage.safetensors import Entry, Header, brief, check_plain, file_head

_NUMPY = {"U32": "<u4", "F32": "<f4", "BF16": "<u2"}


@dataclass(frozen=True, slots=True)
class Beside:
    """One kind of such files.

    Attributes:
        name: Of the file.
        key: Of the JSON object in its metadata.
        members: What that holds besides `version`, `records` and `checksum`.
        version: Of its form.
    """

    name: str
    key: str
    members: frozenset[str]
    version: int = 1

    def find(self, packed: Path) -> Path | None:
        """Return the file of a packed checkpoint; None where it has none.

        Raises:
            CheckpointError: The index names it and it is missing, or the other way round.
        """
        path, index = packed / self.name, packed / PACKED_INDEX_NAME
        listed = published_files(index) if index.exists() else None
        if not path.is_file():
            if listed is not None and self.name in listed:
                raise CheckpointError(
                    f"{path}: is missing, and the index names it; copy it again, or pack the "
                    "model again"
                )
            return None
        if listed is not None and self.name not in listed:
            raise CheckpointError(
                f"{path}: is not in the index, so it belongs to another checkpoint; remove it"
            )
        return path

    def to_bytes(
        self,
        about: Mapping[str, Any],
        subjects: Iterable[str],
        arrays: Mapping[str, tuple[str, np.ndarray]],
        layouts: Sequence[FileLayout],
    ) -> bytes:
        """Return the file.

        Args:
            about: The `members`.
            subjects: Matrices of the shards that it says something of.
            arrays: Safetensors' dtype and the elements of each array, by name, in their order.
            layouts: The shards.
        """
        entries, parts, start = {}, [], 0
        for name, (dtype, values) in arrays.items():
            bits = values.astype(_NUMPY[dtype], copy=False).tobytes()
            entries[name] = Entry(dtype, values.shape, start, start + len(bits))
            parts.append(bits)
            start += len(bits)
        data, records = b"".join(parts), _records(layouts)
        said = {"version": self.version, **about, "records": {n: records[n] for n in subjects}}
        said["checksum"] = _checksum(said, entries, data)
        text = json.dumps(said, separators=(",", ":"))
        return file_head(entries.items(), {self.key: text}) + data

    def read(
        self, path: Path, layouts: Sequence[FileLayout]
    ) -> tuple[dict[str, Any], dict[str, tuple[Entry, np.ndarray]]]:
        """Return what a file says, and its arrays; of bf16 the bits.

        Raises:
            CheckpointError: It is of other shards.
            FormatError: It is damaged, or of a version that is not known.
        """
        header = Header.read(path)
        check_plain(header)
        about = parse_object(header.metadata.get(self.key, "{}"), f"{path}: {self.key}")
        members = self.members | {"version", "records", "checksum"}
        if about.keys() != members or about["version"] != self.version:
            raise FormatError(
                f"{path}: {self.key} must be of version {self.version} and hold "
                f"{', '.join(sorted(members))}, got {brief(sorted(about))} of version "
                f"{brief(about.get('version'))}; upgrade endor, or pack the model again"
            )
        data = path.read_bytes()[header.data_start :]
        recorded = about.pop("checksum")
        found = _checksum(about, header.entries, data)
        if recorded != found:
            raise ChecksumError(
                f"{path}: checksum must be {brief(recorded)}, got {found}; the file is damaged: "
                "copy it again, or pack the model again"
            )
        self._check_records(path, about["records"], _records(layouts))
        arrays = {}
        for name, entry in header.entries.items():
            if entry.dtype not in _NUMPY:
                raise FormatError(
                    f"{path}: {name}: must be one of {', '.join(_NUMPY)}, got {entry.dtype}; pack "
                    "the model again"
                )
            values = np.frombuffer(data[entry.start : entry.stop], _NUMPY[entry.dtype])
            arrays[name] = entry, values.reshape(entry.shape)
        return about, arrays

    def _check_records(self, path: Path, records: Any, known: Mapping[str, str]) -> None:
        if not isinstance(records, dict):
            raise FormatError(
                f"{path}: records must name matrices and the checksums of their records, got "
                f"{brief(records)}; pack the model again"
            )
        for name, recorded in records.items():
            if name not in known:
                raise FormatError(
                    f"{path}: {name}: must be a matrix of the shards, and is none of this "
                    "checkpoint; pack the model again"
                )
            if recorded != known[name]:
                raise CheckpointError(
                    f"{path}: {name}: was made for a record with checksum {brief(recorded)}, and "
                    f"that of the shards is {known[name]}: it is another packing's; copy it again, "
                    "or pack the model again"
                )


def _records(layouts: Sequence[FileLayout]) -> dict[str, str]:
    """Return the checksum of the record of each tensor."""
    return {
        name: layout.records[entry.record].checksum
        for layout in layouts
        for name, entry in layout.tensors.items()
    }


def _checksum(about: Mapping[str, Any], entries: Mapping[str, Entry], data: bytes) -> str:
    """Return the checksum of all that the file says, blind to how its header is written."""
    places = {name: [entry.dtype, entry.shape, entry.start] for name, entry in entries.items()}
    text = json.dumps([about, places], sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return checksum(text.encode() + data)
