"""Checks of content: after these, a damaged or hostile file cannot reach a kernel."""

from collections.abc import Sequence

import numpy as np

from endor import codecs
from endor.codecs import Encoded
from endor.errors import ChecksumError, FormatError, IntegrityError
from endor.storage.checksum import checksum
from endor.storage.layout import FileLayout, Record


def check_bytes(record: Record, record_bytes: np.ndarray) -> None:
    """Raise unless the bytes of a record match its checksum and its pads are zero.

    Args:
        record: From the file's layout.
        record_bytes: u8, flat; bytes past the record's length are ignored.

    Raises:
        ChecksumError: The checksum differs.
        FormatError: A pad holds something.
    """
    where = f"{record.path}: record {record.name!r} at offset {record.offset}"
    found = checksum(record_bytes[: record.nbytes].data)
    if found != record.checksum:
        raise ChecksumError(
            f"{where}: checksum must be {record.checksum}, got {found}; its {record.nbytes} bytes "
            "are damaged: copy or convert the file again"
        )
    for start, stop in record.pads:
        if record_bytes[start:stop].any():
            raise FormatError(f"{where}: bytes {start}:{stop} are a pad and must be 0")


def bind_checked(layout: FileLayout, name: str, record_bytes: np.ndarray) -> Encoded:
    """Return the tensor `name` as views into its record, after checking its structure.

    Raises:
        FormatError: The arrays contradict each other.
        CheckpointError, ShapeError: As `FileLayout.bind`.
    """
    encoded = layout.bind(name, record_bytes)
    try:
        codecs.validate(encoded)
    except FormatError as error:
        raise FormatError(f"{layout.path}: {name}: {error}") from None
    return encoded


def check_record(layout: FileLayout, name: str, record_bytes: np.ndarray) -> None:
    """Check the checksum, pads and every tensor of the record `name`.

    Raises:
        ChecksumError: The bytes are damaged.
        FormatError: The bytes are as they were written, and break the format.
    """
    record = layout.records[name]
    check_bytes(record, record_bytes)
    for tensor in record.tensors:
        bind_checked(layout, tensor, record_bytes)


class CheckedRecord:
    """A record that is read again and again: each time its bytes are checked, and become tensors.

    Args:
        layout: The file.
        name: The record.
        tensors: Those of its tensors that are wanted.
        verify: Check the checksum at each read, and the structure at the first.

    Attributes:
        record: The record.
    """

    __slots__ = ("_layout", "_right", "_verify", "_views", "record")

    def __init__(
        self, layout: FileLayout, name: str, tensors: Sequence[str], *, verify: bool
    ) -> None:
        self.record = layout.records[name]
        self._layout = layout
        self._verify = verify
        self._right = False
        self._views = [
            (
                tensor,
                layout.tensors[tensor].spec,
                [
                    (each.suffix, each.start, each.stop, each.dtype, each.shape)
                    for each in layout.tensors[tensor].arrays
                ],
            )
            for tensor in tensors
        ]

    def check(self, record_bytes: np.ndarray) -> bool:
        """Raise unless the bytes are right; False where nothing is to be checked.

        Args:
            record_bytes: u8, flat, contiguous; bytes past the record's length are ignored.

        Raises:
            FormatError: They are damaged, or break the format.
            IntegrityError: They were right before, and are others now.
        """
        record = self.record
        if self._verify and not self._right:
            check_record(self._layout, record.name, record_bytes)
            self._right = True
        elif self._verify:
            try:
                check_bytes(record, record_bytes)
            except FormatError as error:
                raise IntegrityError(
                    f"{record.path}: record {record.name!r} changed since it was first read; "
                    f"something writes to the file: load the model again ({error})"
                ) from error
        return self._verify

    def bind(self, record_bytes: np.ndarray) -> dict[str, Encoded]:
        """Return the tensors as views of the bytes, by name."""
        return {
            name: Encoded(
                spec,
                {
                    suffix: record_bytes[start:stop].view(dtype).reshape(shape)
                    for suffix, start, stop, dtype, shape in arrays
                },
            )
            for name, spec, arrays in self._views
        }
