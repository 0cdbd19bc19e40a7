"""Stock safetensors files: strict header parsing, and reads by offset into the caller's buffer."""

import json
import math
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from endor.codecs import DType, dtype
from endor.errors import CheckpointError, DTypeError

MAX_HEADER_BYTES = 100_000_000
READ_BYTES = 1 << 30


@dataclass(frozen=True, slots=True)
class Extent:
    """Where a tensor lies in its file."""

    dtype: DType
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Header:
    """A parsed safetensors header; offsets are absolute."""

    tensors: Mapping[str, Extent]
    metadata: Mapping[str, str]


def read_header(path: Path) -> Header:
    """Return the header of a safetensors file after checking it against the file's size.

    Raises:
        CheckpointError: the file is missing, unreadable, truncated or contradicts itself.
    """
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            prefix = file.read(8)
            if len(prefix) < 8:
                raise CheckpointError(
                    f"{path}: a safetensors file has at least 8 bytes, this one has {size}; "
                    "fetch it again"
                )
            (length,) = struct.unpack("<Q", prefix)
            if length > min(MAX_HEADER_BYTES, size - 8):
                raise CheckpointError(
                    f"{path}: the header should take {length} bytes but the file has {size}; "
                    "it is truncated or not a safetensors file; fetch it again"
                )
            text = file.read(length)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file; is the checkpoint complete?") from None
    try:
        fields = json.loads(text, object_pairs_hook=_no_duplicates)
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path}: the header is not JSON ({error}); fetch it again") from None
    except _DuplicateError as error:
        raise CheckpointError(f"{path}: the header names {error} twice") from None
    if not isinstance(fields, dict):
        raise CheckpointError(f"{path}: the header must be a JSON object; fetch it again")
    metadata = fields.pop("__metadata__", None) or {}
    tensors = {name: _extent(path, name, entry, 8 + length) for name, entry in fields.items()}
    _check_layout(path, tensors, 8 + length, size)
    return Header(tensors, {str(key): str(value) for key, value in metadata.items()})


class _DuplicateError(ValueError):
    pass


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in pairs:
        if key in out:
            raise _DuplicateError(key)
        out[key] = value
    return out


def _extent(path: Path, name: str, entry: Any, data_start: int) -> Extent:
    try:
        code, shape = entry["dtype"], tuple(entry["shape"])
        begin, end = entry["data_offsets"]
        numbers = (*shape, begin, end)
        if not all(type(number) is int and number >= 0 for number in numbers):
            raise ValueError("sizes and offsets must be whole and not negative")
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: {name}: malformed header entry ({error!r})") from None
    try:
        kind = dtype(code)
    except DTypeError as error:
        raise CheckpointError(f"{path}: {name}: {error}") from None
    nbytes = math.prod(shape) * kind.itemsize
    if end - begin != nbytes:
        raise CheckpointError(
            f"{path}: {name}: {code} of shape {list(shape)} takes {nbytes} bytes, "
            f"the header gives it {end - begin}"
        )
    return Extent(kind, shape, data_start + begin, nbytes)


def _check_layout(path: Path, tensors: Mapping[str, Extent], data_start: int, size: int) -> None:
    position = data_start
    for name, extent in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if extent.offset != position:
            raise CheckpointError(
                f"{path}: {name}: must start at byte {position}, where the tensor before it ends; "
                f"the header says {extent.offset}"
            )
        position += extent.nbytes
    if position > size:
        raise CheckpointError(
            f"{path}: truncated: the header needs {position} bytes, the file has {size}; "
            "fetch it again"
        )
    if position < size:
        raise CheckpointError(
            f"{path}: {size - position} bytes follow the last tensor; fetch it again"
        )


class ReadOnlyFile:
    """A file read by offset, from any thread."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def read_into(self, offset: int, out: np.ndarray) -> None:
        """Fill `out` (uint8) with the bytes from `offset` on.

        Raises:
            CheckpointError: the file ends early.
        """
        view = out.data.cast("B")
        done = 0
        while done < len(view):
            count = os.preadv(self._fd, [view[done : done + READ_BYTES]], offset + done)
            if count == 0:
                raise CheckpointError(
                    f"{self.path}: ends at byte {offset + done}, {len(view) - done} more were "
                    "expected; did it change while it was read?"
                )
            done += count

    def close(self) -> None:
        """Close the file; reading again is an error."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> "ReadOnlyFile":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
