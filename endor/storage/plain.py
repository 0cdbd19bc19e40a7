"""Plain safetensors files, with Endor's errors.

Read by offset, not mapped: a mapped file that shrinks kills the process with SIGBUS.
"""

import os
from typing import TYPE_CHECKING

import numpy as np

from endor.codecs import dtype
from endor.errors import TruncatedError
from endor.packed import tensor_of
from endor.storage.positioned import read_at
from endor.storage.safetensors import Header, check_plain

if TYPE_CHECKING:
    import torch


class PlainFile:
    """A safetensors file that Endor did not write.

    Args:
        header: Of the file, which stays open until `close`.

    Raises:
        FormatError: The header contradicts itself or the file's size.
        OSError: The file cannot be opened.
    """

    def __init__(self, header: Header) -> None:
        check_plain(header)
        self._header = header
        self.names: list[str] = sorted(header.entries)
        self.metadata: dict[str, str] = dict(header.metadata)
        self._fd = os.open(header.path, os.O_RDONLY | os.O_CLOEXEC)

    def get_tensor(self, name: str) -> "torch.Tensor":
        """Return the tensor `name`, which must exist, on the CPU, in memory of its own.

        Raises:
            TruncatedError: The file ends before it does.
            DTypeError: This torch has no such element type.
        """
        entry = self._header.entries[name]
        kind = dtype(entry.dtype)
        out = np.empty(entry.stop - entry.start, dtype=np.uint8)
        offset = self._header.data_start + entry.start
        done = read_at(self._fd, out.data, offset, self._header.path)
        if done < out.size:
            raise TruncatedError(
                f"{self._header.path}: {name}: ends at byte {offset + done}, {out.size - done} "
                "more were expected; the file was changed while it was read: copy it again"
            )
        return tensor_of(
            out.view(kind.uint).reshape(kind.unit_shape(entry.shape)), kind, entry.shape
        )

    def shape_of(self, name: str) -> tuple[tuple[int, ...], str]:
        """Return the shape and the safetensors code of the tensor `name`, which must exist."""
        entry = self._header.entries[name]
        return tuple(entry.shape), entry.dtype

    def close(self) -> None:
        """Close the file. May be called twice."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def __del__(self) -> None:
        if hasattr(self, "_fd"):
            self.close()
