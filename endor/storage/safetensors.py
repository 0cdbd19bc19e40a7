"""The stock safetensors format: the only place where its headers are parsed and written.

A file is the length of its header (u64, little endian), the header (JSON), and the data. Parsing is
strict: what the safetensors library would refuse is refused, with the file, the rule and what was
found. What Endor adds to the format is in `seal` and `directory`.
"""

import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from endor.codecs import DTYPES
from endor.errors import FormatError, TruncatedError
from endor.jsontext import parse_object

PREFIX_BYTES = 8
MAX_HEADER_BYTES = 100_000_000
"""What the safetensors library accepts."""

MAX_DIMS = 32

METADATA_KEY = "__metadata__"

HEADER_ALIGN = 8
"""Where the safetensors library lets the data begin."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One array of a safetensors file.

    Attributes:
        dtype: Safetensors code.
        shape: Its shape, row-major.
        start: First byte, counted from the start of the data section.
        stop: First byte after it.
    """

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Header:
    """The header of a safetensors file, not yet checked against Endor's rules.

    Attributes:
        path: The file.
        file_bytes: Its size.
        data_start: Offset of the data section.
        entries: Array per key, in header order.
        metadata: The file's `__metadata__`.
        raw: Length prefix and JSON, as they are in the file.
    """

    path: Path
    file_bytes: int
    data_start: int
    entries: Mapping[str, Entry]
    metadata: Mapping[str, str]
    raw: bytes

    @classmethod
    def read(cls, path: Path) -> "Header":
        """Return the header of the safetensors file at `path`.

        Raises:
            TruncatedError: The file ends inside its header.
            FormatError: The header is not what safetensors allows.
        """
        with path.open("rb") as file:
            file_bytes = os.fstat(file.fileno()).st_size
            raw = file.read(PREFIX_BYTES)
            if len(raw) < PREFIX_BYTES:
                raise TruncatedError(
                    f"{path}: truncated: has {file_bytes} bytes, needs {PREFIX_BYTES} for the "
                    "header length; copy the file again"
                )
            length = int.from_bytes(raw, "little")
            if length > MAX_HEADER_BYTES:
                raise FormatError(
                    f"{path}: header length must be at most {MAX_HEADER_BYTES}, got {length}; "
                    "this is not a safetensors file, or it is damaged"
                )
            data_start = PREFIX_BYTES + length
            if data_start > file_bytes:
                raise TruncatedError(
                    f"{path}: truncated: has {file_bytes} bytes, needs {data_start} for the "
                    "header alone; copy the file again"
                )
            raw += file.read(length)
        first = raw[PREFIX_BYTES : PREFIX_BYTES + 1]
        if first != b"{":
            raise FormatError(
                f"{path}: header must begin with b'{{', got {first!r}; this is not a safetensors "
                "file, or it is damaged"
            )
        document = parse_object(raw[PREFIX_BYTES:], f"{path}: header")
        metadata = document.pop(METADATA_KEY, {})
        metadata = {} if metadata is None else metadata  # as the safetensors library has it
        if not isinstance(metadata, dict) or not all(
            isinstance(value, str) for value in metadata.values()
        ):
            raise FormatError(f"{path}: {METADATA_KEY} must map strings to strings")
        entries = {key: _parse_entry(path, key, value) for key, value in document.items()}
        return cls(path, file_bytes, data_start, entries, metadata, raw)


def header_json(entries: Iterable[tuple[str, Entry]], metadata: Mapping[str, str]) -> bytes:
    """Return the header of a file with `entries` in this order, without length and padding.

    Raises:
        FormatError: A name or the metadata is no valid Unicode.
    """
    document: dict[str, Any] = {METADATA_KEY: {"format": "pt", **metadata}}
    for key, entry in entries:
        document[key] = {
            "dtype": entry.dtype,
            "shape": entry.shape,
            "data_offsets": (entry.start, entry.stop),
        }
    try:
        return json.dumps(document, separators=(",", ":"), ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise FormatError(f"names and metadata must be valid Unicode: {error}") from None


def with_length(text: bytes, data_start: int) -> bytes:
    """Return a header's length, `text`, and the spaces that fill it up to `data_start`."""
    length = data_start - PREFIX_BYTES
    return length.to_bytes(PREFIX_BYTES, "little") + text.ljust(length)


def file_head(
    entries: Iterable[tuple[str, Entry]],
    metadata: Mapping[str, str] | None = None,
    *,
    align: int = HEADER_ALIGN,
) -> bytes:
    """Return what a stock file begins with; its length, where the data starts, is a multiple of
    `align`. Errors as for `header_json`."""
    text = header_json(entries, metadata or {})
    return with_length(text, -(-(PREFIX_BYTES + len(text)) // align) * align)


def is_count(value: object) -> bool:
    """Whether `value` is a non-negative integer that fits 64 bits (and no bool)."""
    return type(value) is int and 0 <= value < 1 << 63


def is_shape(value: object) -> bool:
    """Whether `value` is a list of sizes that an array can have.

    Sizes beside a 0 count too: no library can hold an array of `[0, 2**62]`.
    """
    return (
        isinstance(value, list)
        and len(value) <= MAX_DIMS
        and all(map(is_count, value))
        and math.prod(max(size, 1) for size in value) < 1 << 60
    )


def brief(value: object) -> str:
    """Return `value` for an error message, cut where a hostile file would fill the screen."""
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:100]}..."


def check_plain(header: Header) -> None:
    """Raise unless the arrays of a plain file fill its data section without hole or overlap.

    Raises:
        TruncatedError: The file is shorter than its header says.
        FormatError: Any other contradiction, or an unknown dtype.
    """
    position = 0
    order = sorted(header.entries.items(), key=lambda item: (item[1].start, item[1].stop))
    for key, entry in order:
        check_entry_size(header.path, key, entry)
        if entry.start != position:
            raise FormatError(
                f"{header.path}: {key}: must start at byte {position} of the data, where the "
                f"array before it ends; the header says {entry.start}; copy the file again"
            )
        position = entry.stop
    needed = header.data_start + position
    if needed > header.file_bytes:
        raise TruncatedError(
            f"{header.path}: truncated: has {header.file_bytes} bytes, needs {needed}; copy the "
            "file again"
        )
    if needed < header.file_bytes:
        raise FormatError(
            f"{header.path}: {header.file_bytes - needed} bytes follow the last array; copy the "
            "file again"
        )


def _parse_entry(path: Path, key: str, value: object) -> Entry:
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise FormatError(f"{path}: {key}: must hold dtype, shape and data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str):
        raise FormatError(f"{path}: {key}: dtype must be a string, got {brief(dtype)}")
    if not is_shape(shape):
        raise FormatError(
            f"{path}: {key}: shape must be a list of sizes that an array can have, got "
            f"{brief(shape)}"
        )
    if (
        not isinstance(offsets, list)
        or len(offsets) != 2
        or not all(is_count(offset) for offset in offsets)
        or offsets[0] > offsets[1]
    ):
        raise FormatError(
            f"{path}: {key}: data_offsets must be [start, stop], got {brief(offsets)}"
        )
    return Entry(dtype, tuple(shape), offsets[0], offsets[1])


def check_entry_size(path: Path, key: str, entry: Entry) -> None:
    """Raise `FormatError` unless the entry's bytes are what its dtype and shape need."""
    if entry.dtype not in DTYPES:
        raise FormatError(
            f"{path}: {key}: unknown dtype {brief(entry.dtype)}: dtype must be one of "
            f"{', '.join(DTYPES)}"
        )
    kind, numel = DTYPES[entry.dtype], math.prod(entry.shape)
    if kind.bits and numel * kind.bits % 8:
        raise FormatError(f"{path}: {key}: {entry.dtype} {list(entry.shape)} must fill whole bytes")
    needed = kind.nbytes(numel)
    if entry.stop - entry.start != needed:
        raise FormatError(
            f"{path}: {key}: {entry.dtype} {list(entry.shape)} must take {needed} bytes, "
            f"data_offsets give {entry.stop - entry.start}"
        )
