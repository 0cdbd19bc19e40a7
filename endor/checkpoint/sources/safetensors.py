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
from endor.checkpoint.files import Extent, OpenFiles, read_header
from endor.checkpoint.sources.contract import SourceTensor
from endor.errors import CheckpointError

_PIECE_BYTES = 16 << 20


class SafetensorsSource:
    """Stock safetensors files, read by offset.

    Args:
        path: The directory or file, for messages.
        directory: Where config.json lies; None for a lone file.
        choice: The weight files, relative to the directory of `path`.
    """

    ordered = False

    def __init__(self, path: Path, directory: Path | None, choice: Choice) -> None:
        self.path = path
        self.directory = directory
        self.tensors: dict[str, SourceTensor] = {}
        self._files = OpenFiles()
        self._places: dict[str, tuple[Path, int]] = {}
        root = path if directory is not None else path.parent
        self._paths = [root / file for file in choice.files]
        extents: dict[str, dict[str, Extent]] = {}
        found: dict[str, list[str]] = {}
        for file in choice.files:
            tensors, metadata = read_header(root / file)
            if "endor" in metadata:
                raise CheckpointError(
                    f"{root / file}: is packed by Endor; give its whole directory (with "
                    f"{PACKED_INDEX_NAME})"
                )
            extents[file] = tensors
            for name in tensors:
                found.setdefault(name, []).append(file)

        def equal(name: str, one: str, other: str) -> bool:
            first, second = extents[one][name], extents[other][name]
            if (first.dtype, first.shape) != (second.dtype, second.shape):
                return False
            return self._same_bytes(root / one, first, root / other, second)

        homes = check_index(root, choice, found, equal)
        for file in choice.files:
            for name, extent in extents[file].items():
                if homes[name] == file:
                    self.tensors[name] = SourceTensor(name, extent.dtype, extent.shape, file)
                    self._places[name] = (root / file, extent.offset)

    def _same_bytes(self, one: Path, first: Extent, other: Path, second: Extent) -> bool:
        for at in range(0, first.nbytes, _PIECE_BYTES):
            pieces = []
            for path, extent in ((one, first), (other, second)):
                piece = np.empty(min(_PIECE_BYTES, extent.nbytes - at), dtype=np.uint8)
                self._files.read_into(path, extent.offset + at, piece)
                pieces.append(piece)
            if not np.array_equal(pieces[0], pieces[1]):
                return False
        return True

    def read_into(self, name: str, out: np.ndarray) -> None:
        path, offset = self._places[name]
        self._files.read_into(path, offset, out)

    def config(self) -> dict[str, Any] | None:
        return read_config(self.directory)

    def fingerprint(self) -> str:
        return fingerprint_files(self._paths)

    def close(self) -> None:
        self._files.close()
