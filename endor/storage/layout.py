"""Where everything lies in a packed file."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path

import numpy as np

from endor.codecs import Encoded
from endor.errors import CheckpointError, FormatError, ShapeError
from endor.storage.directory import (
    ALIGN,
    ARRAY_ALIGN,
    FORMAT_VERSION,
    INT_VERSION,
    TAIL_BYTES,
    VERSIONS,
    ArrayEntry,
    Directory,
    Record,
    TensorEntry,
    align_up,
    array_key,
    version_of,
)
from endor.storage.safetensors import Header
from endor.storage.seal import CHECKSUM_KEY, DIRECTORY_KEY, RESERVED_METADATA, check_seal, is_sealed

__all__ = [
    "ALIGN",
    "ARRAY_ALIGN",
    "FORMAT_VERSION",
    "INT_VERSION",
    "TAIL_BYTES",
    "VERSIONS",
    "ArrayEntry",
    "FileLayout",
    "Record",
    "TensorEntry",
    "align_up",
    "array_key",
    "version_of",
]


@dataclass(frozen=True, slots=True)
class FileLayout:
    """The checked directory of a packed file.

    Attributes:
        path: The file.
        file_bytes: Its size.
        data_start: Offset of the first record.
        tensors: Tensor per name, in file order.
        records: Record per name, in file order; they cover the file from `data_start` to its end.
        metadata: The user's own metadata.
        checksum: That of the header, which holds those of the records.
    """

    path: Path
    file_bytes: int
    data_start: int
    tensors: Mapping[str, TensorEntry]
    records: Mapping[str, Record]
    metadata: Mapping[str, str]
    checksum: str = field(compare=False)

    @classmethod
    def read(cls, path: Path | str) -> "FileLayout":
        """Return the layout of the packed file at `path`, after checking all of its structure.

        Reads the header only; its cost does not depend on the sizes that the header claims.

        Raises:
            TruncatedError: The file is shorter than its header says.
            ChecksumError: The header's bytes are damaged.
            FormatError: Any other broken rule, or a version this library does not know.
            OSError: The file cannot be opened.
        """
        return cls.from_header(Header.read(Path(path)))

    @classmethod
    def from_header(cls, header: Header) -> "FileLayout":
        """Return the layout that `header` describes; errors as for `read`."""
        if not is_sealed(header):
            raise FormatError(
                f"{header.path}: metadata must hold {DIRECTORY_KEY!r}, which is missing; this is a "
                "plain safetensors file: endor.load_file and safetensors read it"
            )
        check_seal(header)
        tensors, records = Directory(header).parse()
        metadata = {
            key: value for key, value in header.metadata.items() if key not in RESERVED_METADATA
        }
        return cls(
            header.path,
            header.file_bytes,
            header.data_start,
            tensors,
            records,
            metadata,
            header.metadata[CHECKSUM_KEY],
        )

    @property
    def version(self) -> int:
        """The least format version that holds what the file holds."""
        return version_of(tensor.spec for tensor in self.tensors.values())

    def tensor(self, name: str) -> TensorEntry:
        """Return the entry of the tensor `name`.

        Raises:
            CheckpointError: The file has no such tensor.
        """
        try:
            return self.tensors[name]
        except KeyError:
            raise no_tensor(self.path, name, self.tensors) from None

    def record_of(self, name: str) -> Record:
        """Return the record that holds the tensor `name`; errors as for `tensor`."""
        return self.records[self.tensor(name).record]

    def bind(self, name: str, record_bytes: np.ndarray) -> Encoded:
        """Return the tensor `name` as views into the bytes of its whole record.

        Nothing is copied and the content is not checked: see `endor.storage.check_record`.

        Args:
            name: A tensor of this file.
            record_bytes: u8, flat, C-contiguous, at least the record's length; bytes past it are
                ignored.

        Raises:
            CheckpointError: The file has no such tensor.
            ShapeError: `record_bytes` is not such an array.
        """
        entry = self.tensor(name)
        nbytes = self.records[entry.record].nbytes
        if (
            record_bytes.dtype != np.uint8
            or record_bytes.ndim != 1
            or record_bytes.size < nbytes
            or not record_bytes.flags.c_contiguous
        ):
            raise ShapeError(
                f"{name}: record bytes must be flat u8 of at least {nbytes}, got "
                f"{record_bytes.dtype} {record_bytes.shape}"
            )
        arrays = {
            array.suffix: record_bytes[array.start : array.stop]
            .view(array.dtype)
            .reshape(array.shape)
            for array in entry.arrays
        }
        return Encoded(entry.spec, arrays)


def no_tensor(path: Path, name: str, names: Collection[str]) -> CheckpointError:
    """Return the error for a name that a file does not have, with what may have been meant."""
    near = get_close_matches(name, names, n=3)
    hint = f"; did you mean {' or '.join(near)}?" if near else ""
    return CheckpointError(f"{path}: no tensor {name!r} among its {len(names)}{hint}")
