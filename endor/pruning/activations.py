"""Hidden states of all calibration windows, in memory within a budget and in a file beyond it."""

import math
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import numpy as np
import torch


def batches(count: int, size: int) -> Iterator[tuple[int, int]]:
    """Yield consecutive spans `(start, stop)` of at most `size` that cover `count`."""
    for start in range(0, count, size):
        yield start, min(start + size, count)


class Activations:
    """float32 `(windows, tokens, features)` on the CPU, read and written by spans of windows.

    A file is read and written with plain calls and never mapped: mapped pages would count as
    memory of the process. It has no name, so that nothing is left behind.

    Args:
        shape: `(windows, tokens, features)`.
        budget_bytes: Most bytes in memory; a larger whole goes to a file.
        folder: Where the file goes.
    """

    def __init__(self, shape: tuple[int, ...], budget_bytes: int, folder: Path) -> None:
        self.shape = shape
        self._window_bytes = 4 * math.prod(shape[1:])
        self._memory: torch.Tensor | None = None
        self._file: IO[bytes] | None = None
        if self._window_bytes * shape[0] <= budget_bytes:
            self._memory = torch.empty(shape, dtype=torch.float32)
        else:
            self._file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115

    @property
    def in_memory(self) -> bool:
        """Whether the values are in memory, not in a file."""
        return self._memory is not None

    def read(self, start: int, stop: int) -> torch.Tensor:
        """Return windows `start` to `stop`; not to be modified."""
        if self._memory is not None:
            return self._memory[start:stop]
        assert self._file is not None
        out = np.empty((stop - start, *self.shape[1:]), dtype=np.float32)
        view = out.data.cast("B")
        self._file.seek(start * self._window_bytes)
        while view:
            count = self._file.readinto(view)  # type: ignore[attr-defined]
            if not count:
                raise OSError("activation file: ends before its last window")
            view = view[count:]
        return torch.from_numpy(out)

    def write(self, start: int, values: torch.Tensor) -> None:
        """Replace the windows from `start` on."""
        values = values.detach().to("cpu", torch.float32).contiguous()
        if self._memory is not None:
            self._memory[start : start + len(values)] = values
            return
        assert self._file is not None
        view = values.numpy().data.cast("B")
        self._file.seek(start * self._window_bytes)
        while view:
            view = view[self._file.write(view) :]

    def close(self) -> None:
        """Give up memory and file."""
        self._memory = None
        if self._file is not None:
            self._file.close()
