"""Stock safetensors files: strict header parsing, and reads by offset into the caller's buffer."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np

from endor.codecs import DType, dtype
from endor.errors import CheckpointError, FormatError
from endor.storage.header import Header, check_entry_size

READ_BYTES = 1 << 30


@dataclass(frozen=True, slots=True)
class Extent:
    """Where a tensor lies in its file."""

    dtype: DType
    shape: tuple[int, ...]
    offset: int
    nbytes: int


def read_header(path: Path) -> tuple[dict[str, Extent], Mapping[str, str]]:
    """Return tensors and metadata of a safetensors file after checking them against its size.

    Raises:
        CheckpointError: the file is missing, unreadable, truncated or contradicts itself.
    """
    try:
        header = Header.read(path)
        tensors = {}
        for name, entry in header.entries.items():
            check_entry_size(path, name, entry)
            start, nbytes = header.data_start + entry.start, entry.stop - entry.start
            tensors[name] = Extent(dtype(entry.dtype), entry.shape, start, nbytes)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file; is the checkpoint complete?") from None
    except FormatError as error:
        raise CheckpointError(str(error)) from None
    _check_layout(path, tensors, header.data_start, header.file_bytes)
    return tensors, header.metadata


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
