"""Stock safetensors checkpoints, read by offset."""

from pathlib import Path
from typing import Any

import numpy as np

from endor.checkpoint.directory import (
    PACKED_INDEX_NAME,
    Choice,
    check_index,
    fingerprint_files,
    read_config,
)
from endor.checkpoint.sources.contract import SourceTensor
from endor.codecs import dtype
from endor.errors import CheckpointError, FormatError
from endor.foreign import describe_file
from endor.storage.positioned import OpenFiles
from endor.storage.safetensors import Header, check_plain
from endor.storage.seal import DIRECTORY_KEY

_PIECE_BYTES = 16 << 20


def read_header(path: Path) -> Header:
    """Return the header of a stock safetensors file, checked against the file's size.

    Raises:
        CheckpointError: the file is missing, unreadable, truncated or contradicts itself.
    """
    try:
        header = Header.read(path)
        check_plain(header)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file; is the checkpoint complete?") from None
    except FormatError as error:
        described = describe_file(path)
        raise CheckpointError(f"{path}: {described}" if described else str(error)) from None
    return header


class SafetensorsSource:
    """Stock safetensors files, read by offset.

    Args:
        path: The directory or file, for messages.
        directory: Where config.json lies; None for a lone file.
        choice: The weight files, relative to the directory of `path`.
        once: Refuse a tensor that lies in two files, for their content cannot be compared.

    Attributes:
        places: File and offset of each tensor.
    """

    ordered = False

    def __init__(
        self, path: Path, directory: Path | None, choice: Choice, *, once: bool = False
    ) -> None:
        self.path = path
        self.directory = directory
        self.tensors: dict[str, SourceTensor] = {}
        self._files = OpenFiles()
        self.places: dict[str, tuple[Path, int]] = {}
        root = path if directory is not None else path.parent
        self._paths = [root / file for file in choice.files]
        headers: dict[str, Header] = {}
        found: dict[str, list[str]] = {}
        for file in choice.files:
            header = headers[file] = read_header(root / file)
            if DIRECTORY_KEY in header.metadata:
                raise CheckpointError(
                    f"{root / file}: is packed by Endor; give its whole directory (with "
                    f"{PACKED_INDEX_NAME})"
                )
            for name in header.entries:
                found.setdefault(name, []).append(file)

        twice = [name for name, files in found.items() if len(files) > 1]
        if once and twice:
            raise CheckpointError(
                f"{path.name}: {twice[0]} lies in two files, which are compared only when all is "
                "there; leave out --stream"
            )

        def equal(name: str, one: str, other: str) -> bool:
            return self._same_bits(name, headers[one], headers[other])

        homes = check_index(root, choice, found, equal)
        for file, header in headers.items():
            for name, entry in header.entries.items():
                if homes[name] == file:
                    self.tensors[name] = SourceTensor(name, dtype(entry.dtype), entry.shape, file)
                    self.places[name] = (header.path, header.data_start + entry.start)

    def _same_bits(self, name: str, one: Header, other: Header) -> bool:
        """Whether a tensor is the same in two files."""
        first, second = one.entries[name], other.entries[name]
        if (first.dtype, first.shape) != (second.dtype, second.shape):
            return False
        nbytes = first.stop - first.start
        for at in range(0, nbytes, _PIECE_BYTES):
            pieces = []
            for header, entry in ((one, first), (other, second)):
                piece = np.empty(min(_PIECE_BYTES, nbytes - at), dtype=np.uint8)
                offset = header.data_start + entry.start + at
                self._files.read_into(header.path, offset, piece)
                pieces.append(piece)
            if not np.array_equal(pieces[0], pieces[1]):
                return False
        return True

    def read_into(self, name: str, out: np.ndarray) -> None:
        path, offset = self.places[name]
        self._files.read_into(path, offset, out)

    def config(self) -> dict[str, Any] | None:
        return read_config(self.directory)

    def fingerprint(self) -> str:
        return fingerprint_files(self._paths)

    def close(self) -> None:
        self._files.close()
