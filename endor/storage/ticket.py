"""One read that is under way."""

import threading
import time
from dataclasses import dataclass

import numpy as np

from endor.storage.layout import Record


@dataclass(frozen=True, slots=True)
class ReadStat:
    """One finished read.

    Attributes:
        nbytes: Bytes read, alignment included.
        seconds: From submission to the last byte.
        retries: Short, interrupted or refused read calls that were repeated.
    """

    nbytes: int
    seconds: float
    retries: int


class Ticket:
    """A read that was submitted; `RecordReader.wait` says how it ended."""

    def __init__(self, record: Record, data: np.ndarray, skip: int, length: int) -> None:
        self.record = record
        self._data = data
        self._wanted = data[skip : skip + length]
        self._began = time.perf_counter()
        self._lock = threading.Lock()
        self._finished = threading.Event()
        self._blocks = 0
        self._retries = 0
        self._error: BaseException | None = None
        self._stat: ReadStat | None = None

    @property
    def done(self) -> bool:
        """Whether no thread touches the buffer any more, for good or ill."""
        return self._finished.is_set()

    @property
    def array(self) -> np.ndarray:
        """The bytes that were asked for, as a view of the buffer; waits for them.

        Raises:
            ReadError, TruncatedError, BackendError: As `RecordReader.wait`.
        """
        self._result()
        return self._wanted

    def settle(self) -> None:
        """Wait until no thread touches the buffer any more, however the read ended."""
        self._finished.wait()

    def _stopped(self) -> bool:
        return self._error is not None

    def _fail(self, error: BaseException) -> None:
        with self._lock:
            if self._error is None:
                self._error = error

    def _forget(self, blocks: int) -> None:
        """Leave out blocks that will never start."""
        with self._lock:
            self._blocks -= blocks

    def _end_block(self, retries: int) -> bool:
        """Count one block as over; True for the last one."""
        with self._lock:
            self._blocks -= 1
            self._retries += retries
            return self._blocks == 0

    def _finish(self) -> None:
        seconds = time.perf_counter() - self._began
        self._stat = ReadStat(self._data.size, seconds, self._retries)
        self._finished.set()

    def _result(self) -> ReadStat:
        self.settle()
        if self._error is not None:
            raise self._error
        assert self._stat is not None
        return self._stat
