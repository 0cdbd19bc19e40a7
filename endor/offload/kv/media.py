"""Where the keys and values of one layer stay between uses: host memory, or a file.

Both hold records of one size, one for each token, in the order of the tokens: what a step adds goes
to the end, and forgetting tokens is forgetting the end.
"""

import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from endor.errors import BackendError, ReadError
from endor.offload.device import Device
from endor.storage import HostBuffer

BLOCK_BYTES = 256 << 10
"""Host memory is taken in blocks of about so much: growing copies nothing."""

Vectored = Callable[[int, Sequence[memoryview], int], int]


@dataclass(frozen=True, slots=True)
class FileAccess:
    """How files are made, read and written.

    Attributes:
        directory: Where; None means `/var/tmp`, which is kept on a disk where `/tmp` may be in
            memory, or what `TMPDIR` says.
        read: As `os.preadv`.
        write: As `os.pwritev`.
    """

    directory: Path | None = None
    read: Vectored = os.preadv
    write: Vectored = os.pwritev

    def open(self) -> int:
        """Return the descriptor of a new file that vanishes when it is closed.

        Raises:
            BackendError: None can be made there.
        """
        place = self.directory or Path(os.environ.get("TMPDIR") or "/var/tmp")
        try:
            with tempfile.TemporaryFile(dir=place, prefix="endor-kv-") as file:
                return os.dup(file.fileno())
        except OSError as error:
            raise BackendError(
                f"{place}: cannot hold keys and values ({error.strerror or error}): name a "
                "directory that can be written"
            ) from None


class RamMedium:
    """Records in host memory.

    Args:
        record_bytes: Size of a token's record.
        device: Page-lock the memory for its copies.
    """

    def __init__(self, record_bytes: int, device: Device | None = None) -> None:
        self.record_bytes = record_bytes
        self._device = device
        self._per_block = max(1, BLOCK_BYTES // record_bytes)
        self._blocks: list[HostBuffer] = []
        self._pinned: list[bool] = []

    @property
    def ram_bytes(self) -> int:
        """Host memory in use."""
        return sum(block.nbytes for block in self._blocks)

    def growth_bytes(self, records: int) -> int:
        """Return the host memory that must be taken before it holds so many records."""
        blocks = -(-records // self._per_block) - len(self._blocks)
        return max(0, blocks) * self._per_block * self.record_bytes

    def views(self, start: int, stop: int) -> list[np.ndarray]:
        """Return the memory of records `start` to `stop`, u8, one flat array per block.

        It is there when it was not before; it stays valid until `truncate` drops it.
        """
        while len(self._blocks) * self._per_block < stop:
            block = HostBuffer(self._per_block * self.record_bytes)
            refused = self._device.pin(block.array) if self._device is not None else "no device"
            self._blocks.append(block)
            self._pinned.append(refused is None)
        out = []
        for at in range(start // self._per_block, -(-stop // self._per_block)):
            first = at * self._per_block
            begin = (max(start, first) - first) * self.record_bytes
            end = (min(stop, first + self._per_block) - first) * self.record_bytes
            out.append(self._blocks[at].array[begin:end])
        return out

    def write(self, start: int, data: np.ndarray) -> None:
        """Store whole records from `start` on."""
        at = 0
        for view in self.views(start, start + data.nbytes // self.record_bytes):
            view[:] = data[at : at + view.nbytes]
            at += view.nbytes

    def truncate(self, records: int) -> None:
        """Forget all but the first `records`."""
        needed = -(-records // self._per_block)
        while len(self._blocks) > needed:
            block, pinned = self._blocks.pop(), self._pinned.pop()
            if pinned and self._device is not None:
                self._device.unpin(block.array)

    def close(self) -> None:
        """Give the memory back."""
        self.truncate(0)


class FileMedium:
    """Records in a file that vanishes with this.

    Args:
        record_bytes: Size of a token's record.
        access: How files are made, read and written.

    Raises:
        BackendError: No file can be made.
    """

    ram_bytes = 0

    def __init__(self, record_bytes: int, access: FileAccess) -> None:
        self.record_bytes = record_bytes
        self._access = access
        self._file = access.open()

    def write(self, start: int, data: np.ndarray) -> None:
        """Store whole records from `start` on.

        Raises:
            BackendError: The disk is full or fails.
        """
        left, offset = memoryview(data.data), start * self.record_bytes
        while left:
            try:
                count = self._access.write(self._file, [left], offset)
            except OSError as error:
                raise BackendError(
                    f"keys and values: {left.nbytes} bytes could not be saved "
                    f"({error.strerror or error}): free space on that disk or name another one"
                ) from error
            left, offset = left[count:], offset + count

    def read(self, start: int, out: np.ndarray) -> None:
        """Fill `out` with whole records from `start` on.

        Raises:
            ReadError: The disk fails, or the file lost its end.
        """
        left, offset = memoryview(out.data), start * self.record_bytes
        while left:
            try:
                count = self._access.read(self._file, [left], offset)
            except OSError as error:
                raise ReadError(
                    f"keys and values: {left.nbytes} bytes could not be read back "
                    f"({error.strerror or error}): the disk fails; generate again"
                ) from error
            if not count:
                raise ReadError(
                    f"keys and values: the file must have {offset + left.nbytes} bytes, it ends "
                    f"at {offset}: it was cut off; generate again"
                )
            left, offset = left[count:], offset + count

    def truncate(self, records: int) -> None:
        """Forget all but the first `records`."""
        os.ftruncate(self._file, min(records * self.record_bytes, os.fstat(self._file).st_size))

    def close(self) -> None:
        """Give the file back; may be called twice."""
        if getattr(self, "_file", -1) >= 0:  # none was made when opening it failed
            os.close(self._file)
            self._file = -1

    def __del__(self) -> None:
        self.close()
