"""The directory of a packed file: which arrays and records there are, every rule checked."""

from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from endor.codecs import TensorSpec
from endor.errors import FormatError, TruncatedError
from endor.jsontext import parse_object
from endor.storage.safetensors import (
    METADATA_KEY,
    Entry,
    Header,
    brief,
    check_entry_size,
    is_count,
    is_shape,
)
from endor.storage.seal import DIRECTORY_KEY, PAD_PREFIX

FORMAT_VERSION = 1
"""What is written where every codec is known to it, so that older readers read it."""

INT_VERSION = 2
"""What is written where a tensor is in codec `int`."""

FIELDS_VERSION = 3
"""What is written where a tensor is in codec `fields`."""

LEVELS_VERSION = 4
"""What is written where a tensor in codec `int` has levels."""

TRANSPOSED_VERSION = 5
"""What is written where a matrix is stored transposed."""

BUNDLES_VERSION = 6
"""What is written where the rows of a transposed matrix are bundled."""

VERSIONS = tuple(range(FORMAT_VERSION, BUNDLES_VERSION + 1))
"""What this library reads."""

ALIGN = 4096
"""Records start at multiples of this and are multiples of it long: what O_DIRECT needs."""

ARRAY_ALIGN = 256
"""Arrays start at multiples of this inside their record."""

TAIL_BYTES = 128
"""Readable bytes of the record after each array, so that kernels may load whole registers."""


def version_of(specs: Iterable[TensorSpec]) -> int:
    """Return the least format version that holds tensors stored like these."""
    return max((_since(spec) for spec in specs), default=FORMAT_VERSION)


_SINCE: dict[str, int] = {"int": INT_VERSION, "fields": FIELDS_VERSION}
"""First version of the codecs that were not in the first one."""


def _since(spec: TensorSpec) -> int:
    if spec.coding is not None and spec.coding.levels:
        return LEVELS_VERSION
    if spec.bundles is not None:
        return BUNDLES_VERSION
    if spec.transposed:
        return TRANSPOSED_VERSION
    return _SINCE.get(spec.codec, FORMAT_VERSION)


def array_key(name: str, suffix: str) -> str:
    """Return the safetensors key of one array of the tensor `name`."""
    return f"{name}_{suffix}" if suffix else name


def align_up(value: int, align: int) -> int:
    """Return the smallest multiple of `align` that is not below `value`."""
    return -(-value // align) * align


@dataclass(frozen=True, slots=True)
class ArrayEntry:
    """Where one stored array lies in its record.

    Attributes:
        suffix: Its role in the tensor; `""` for a dense one.
        dtype: The unsigned numpy type it is viewed as.
        shape: Its shape, row-major.
        start: First byte, counted from the start of the record.
        stop: First byte after it.
    """

    suffix: str
    dtype: np.dtype[np.unsignedinteger]
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor of a file: its spec, and where its arrays lie in its record."""

    name: str
    spec: TensorSpec
    record: str
    arrays: tuple[ArrayEntry, ...]


@dataclass(frozen=True, slots=True)
class Record:
    """One unit of I/O.

    Attributes:
        name: Unique in the file.
        path: The file.
        offset: First byte in the file, a multiple of `ALIGN`.
        nbytes: Length, a multiple of `ALIGN`.
        checksum: xxh3_64 of the bytes, 16 hexadecimal digits.
        tensors: Names of the tensors inside, in file order.
        pads: `(start, stop)` of each pad, counted from the start of the record.
    """

    name: str
    path: Path
    offset: int
    nbytes: int
    checksum: str
    tensors: tuple[str, ...]
    pads: tuple[tuple[int, int], ...]


class Directory:
    """Turns a sealed header into tensors and records, one rule after the other."""

    def __init__(self, header: Header) -> None:
        self.header = header
        self.path = header.path
        text = header.metadata.get(DIRECTORY_KEY)
        if text is None:
            raise self.wrong(f"metadata must hold {DIRECTORY_KEY!r}")
        self.directory = parse_object(text, f"{self.path}: metadata {DIRECTORY_KEY!r}")
        self.records: dict[str, tuple[int, int, str]] = {}
        self.claims: dict[str, str] = {}

    def wrong(self, problem: str) -> FormatError:
        return FormatError(f"{self.path}: {problem}; copy or convert the file again")

    def parse(self) -> tuple[dict[str, TensorEntry], dict[str, Record]]:
        """Return tensors and records, both in file order.

        Raises:
            TruncatedError: The file is shorter than its header says.
            FormatError: Any other broken rule.
        """
        self.check_version()
        self.check_sections()
        self.check_records()
        tensors = self.tensors()
        pads = self.pads()
        extra = self.header.entries.keys() - self.claims.keys()
        if extra:
            raise self.wrong(f"array {brief(min(extra))} belongs to no tensor and is no pad")
        inside: dict[str, list[str]] = {name: [] for name in self.records}
        for tensor in tensors.values():
            inside[tensor.record].append(tensor.name)
        records = {}
        for name, (offset, nbytes, digits) in self.records.items():
            if not inside[name]:
                raise self.wrong(f"record {name!r} must hold a tensor")
            records[name] = Record(
                name, self.path, offset, nbytes, digits, tuple(inside[name]), tuple(pads[name])
            )
        return tensors, records

    def check_version(self) -> None:
        version = self.directory.get("version")
        if not is_count(version) or version == 0:
            raise self.wrong(f"version must be a positive integer, got {brief(version)}")
        if version not in VERSIONS:
            raise FormatError(
                f"{self.path}: format version must be {VERSIONS[0]} to {VERSIONS[-1]}, got "
                f"{version}; upgrade endor to read this file"
            )
        if self.directory.get("align") != ALIGN:
            raise self.wrong(f"align must be {ALIGN}, got {brief(self.directory.get('align'))}")
        if self.header.data_start % ALIGN:
            raise self.wrong(
                f"data must start at a multiple of {ALIGN}, got {self.header.data_start}"
            )

    def check_sections(self) -> None:
        """Arrays must fill the data section: no hole, no overlap, nothing behind the last one."""
        header = self.header
        at = 0
        for key, entry in sorted(
            header.entries.items(), key=lambda item: (item[1].start, item[1].stop)
        ):
            check_entry_size(self.path, key, entry)
            if entry.start != at:
                what = "a hole" if entry.start > at else "an overlap"
                raise self.wrong(f"{key}: must start at {at}, got {entry.start}: {what}")
            at = entry.stop
        needed = header.data_start + at
        if header.file_bytes < needed:
            raise TruncatedError(
                f"{self.path}: truncated: has {header.file_bytes} bytes, needs {needed}; copy or "
                "convert the file again"
            )
        if header.file_bytes > needed:
            raise self.wrong(f"file must end at {needed}, got {header.file_bytes} bytes")

    def check_records(self) -> None:
        at = self.header.data_start
        for name, value in self.section("records").items():
            if not isinstance(value, list) or len(value) != 3:
                raise self.wrong(f"record {name!r} must be [offset, length, checksum]")
            offset, nbytes, digits = value
            if not is_count(offset) or not is_count(nbytes) or nbytes == 0:
                raise self.wrong(f"record {name!r}: bad offset or length in {brief(value)}")
            if offset != at or nbytes % ALIGN:
                raise self.wrong(
                    f"record {name!r} must start at {at} and be a multiple of {ALIGN} long, got "
                    f"{offset} and {nbytes}"
                )
            if not (
                isinstance(digits, str)
                and len(digits) == 16
                and all(c in "0123456789abcdef" for c in digits)
            ):
                raise self.wrong(
                    f"record {name!r}: checksum must be 16 hexadecimal digits, got {brief(digits)}"
                )
            self.records[name] = (offset, nbytes, digits)
            at += nbytes
        if at != self.header.file_bytes:
            raise self.wrong(f"records must end at {self.header.file_bytes}, got {at}")

    def tensors(self) -> dict[str, TensorEntry]:
        out = {}
        for name, fields in self.section("tensors").items():
            if name.startswith(PAD_PREFIX) or name == METADATA_KEY:
                raise self.wrong(f"{name!r} must not name a tensor: it is reserved")
            record = fields.get("record") if isinstance(fields, dict) else None
            if not isinstance(record, str) or record not in self.records:
                raise self.wrong(f"{name}: record must name one of the file's, got {brief(record)}")
            if not is_shape(fields.get("shape")):
                raise self.wrong(f"{name}: shape must be a list of sizes")
            try:
                spec = TensorSpec.from_dict(fields)
            except FormatError as error:
                raise FormatError(f"{self.path}: {name}: {error}") from None
            since, version = version_of([spec]), self.directory["version"]
            if version < since:
                what = "a transposed matrix" if spec.transposed else f"codec {spec.codec}"
                how = {LEVELS_VERSION: " with levels", BUNDLES_VERSION: " in bundles"}.get(
                    since, ""
                )
                raise self.wrong(f"{name}: {what}{how} needs format version {since}, not {version}")
            out[name] = TensorEntry(name, spec, record, self.arrays(name, spec, record))
        return dict(sorted(out.items(), key=lambda item: self.position(item[1])))

    def position(self, tensor: TensorEntry) -> int:
        return self.records[tensor.record][0] + tensor.arrays[0].start

    def arrays(self, name: str, spec: TensorSpec, record: str) -> tuple[ArrayEntry, ...]:
        out = []
        for array in spec.arrays:
            key = array_key(name, array.suffix)
            entry = self.header.entries.get(key)
            if entry is None:
                raise self.wrong(f"{name}: array {key!r} is missing")
            if (entry.dtype, entry.shape) != (array.dtype.name, array.shape):
                raise self.wrong(
                    f"{key}: must be {array.dtype.name} {list(array.shape)} by its tensor's spec, "
                    f"got {entry.dtype} {brief(list(entry.shape))}"
                )
            start, stop = self.place(key, entry, record)
            if start % ARRAY_ALIGN:
                raise self.wrong(f"{key}: must start at a multiple of {ARRAY_ALIGN}, got {start}")
            if stop + TAIL_BYTES > self.records[record][1]:
                raise self.wrong(f"{key}: must end {TAIL_BYTES} bytes before its record does")
            self.claim(key, name)
            out.append(ArrayEntry(array.suffix, array.dtype.uint, array.unit_shape, start, stop))
        return tuple(out)

    def pads(self) -> dict[str, list[tuple[int, int]]]:
        keys = self.directory.get("pads")
        if not isinstance(keys, list):
            raise self.wrong("directory member 'pads' must be a list")
        names = list(self.records)
        offsets = [offset for offset, _, _ in self.records.values()]
        out: dict[str, list[tuple[int, int]]] = {name: [] for name in names}
        for key in keys:
            entry = self.header.entries.get(key) if isinstance(key, str) else None
            if entry is None or not key.startswith(PAD_PREFIX):
                raise self.wrong(f"pad {brief(key)} must name an array {PAD_PREFIX}<n>")
            if entry.dtype != "U8" or len(entry.shape) != 1 or entry.start == entry.stop:
                raise self.wrong(f"{key}: a pad must be U8, of one dimension and not empty")
            self.claim(key, "a pad")
            record = names[bisect_right(offsets, self.header.data_start + entry.start) - 1]
            out[record].append(self.place(key, entry, record))
        return out

    def place(self, key: str, entry: Entry, record: str) -> tuple[int, int]:
        """Return start and stop of an array, counted from its record's start."""
        offset, nbytes, _ = self.records[record]
        start = self.header.data_start + entry.start - offset
        stop = self.header.data_start + entry.stop - offset
        if start < 0 or stop > nbytes:
            raise self.wrong(f"{key}: must lie inside record {record!r}")
        return start, stop

    def claim(self, key: str, owner: str) -> None:
        if key in self.claims:
            raise self.wrong(f"array {key!r} belongs to both {self.claims[key]} and {owner}")
        self.claims[key] = owner

    def section(self, name: str) -> dict[str, Any]:
        value = self.directory.get(name)
        if not isinstance(value, dict):
            raise self.wrong(f"directory member {name!r} must be an object")
        return value
