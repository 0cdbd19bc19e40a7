"""How busy the neurons of a matrix are, and what a step reads of it for that.

By the counts of a calibration. A neuron lies in several runs of bytes of its record, one in each
array or plane, and is read, and kept in memory, by blocks of 4096 bytes.
"""

import math
from dataclasses import dataclass

import numpy as np

from endor.codecs import TensorSpec
from endor.planning.constants import Disk
from endor.storage.layout import ALIGN

GROUPS = 32
"""Groups of equally many neurons, the busiest first, that are told apart."""

WHOLE = 0.45
"""Parts that cost more than this share of a record are not read: the whole is, ahead of its use.
Beside reads ahead, parts took 1.5 times what the disk's prices say, and are waited for; their sums
and their memory come to it (docs/neurons.md)."""


BULK = ("bitmap", "values", "bytes", "planes", "bundles")
"""Arrays of which only parts are read; the others stay in memory."""


@dataclass(frozen=True, slots=True)
class Activity:
    """What is known of the neurons of one matrix.

    Attributes:
        neurons: How many there are.
        shares: Of the tokens, in how many a neuron of each group is active, on average.
        runs: Bytes of each run that a neuron lies in.
    """

    neurons: int
    shares: tuple[float, ...]
    runs: tuple[float, ...]

    @classmethod
    def of(cls, spec: TensorSpec, counts: np.ndarray, tokens: int) -> "Activity":
        """Return that of a matrix stored by neuron whose neurons were active so often."""
        busiest = np.sort(counts)[::-1] / tokens
        shares = tuple(
            float(group.mean()) if len(group) else 0.0 for group in np.array_split(busiest, GROUPS)
        )
        return cls(len(counts), shares, _runs(spec))

    @classmethod
    def alike(cls, spec: TensorSpec, share: float) -> "Activity":
        """Return that of a matrix stored by neuron, each active in such a share of the tokens."""
        return cls(spec.shape[1], (share,) * GROUPS, _runs(spec))

    def active(self, rows: int = 1, kept: float = 0.0) -> float:
        """Return the share of neurons that a step of so many rows needs from disk.

        Args:
            rows: Rows of input, taken to be independent.
            kept: Share of the neurons, the busiest, that are in memory.
        """
        total = 0.0
        for at, share in enumerate(self.shares):
            outside = min(1.0, max(0.0, at + 1 - kept * GROUPS))
            total += outside * (1.0 - math.pow(1.0 - share, rows))
        return total / GROUPS

    def outside(self, rows: int, kept: float) -> float:
        """Return the share of what is active that is not of the busiest `kept` of the neurons."""
        everything = self.active(rows)
        return self.active(rows, kept) / everything if everything else 0.0

    def blocks(self, kept: float) -> float:
        """Return the share of a record's blocks in which so great a share of its neurons lies.

        Those that share a block with a busy neuron are not busy themselves.
        """
        return sum(
            run * (1.0 - math.pow(1.0 - kept, 1.0 + ALIGN / run)) for run in self.runs if run
        ) / (sum(self.runs) or 1.0)

    def kept(self, share: float) -> float:
        """Return the share of neurons that lie in so great a share of the blocks."""
        low, high = 0.0, 1.0
        for _ in range(20):
            middle = (low + high) / 2
            low, high = (middle, high) if self.blocks(middle) <= share else (low, middle)
        return low if share < 1 else 1.0

    def reads(self, packed_bytes: int, disk: Disk, rows: int, kept: float) -> tuple[float, float]:
        """Return what a step reads, and its seconds: of parts, or of the whole where that is less.

        Args:
            packed_bytes: The record.
            disk: Where it lies.
            rows: Rows of input.
            kept: Share of the record that stays in memory.
        """
        whole = packed_bytes / disk.read_gbps / 1e9
        count = self.neurons * self.active(rows, self.kept(kept))
        nbytes = count * sum(run + ALIGN for run in self.runs)
        seconds = (
            nbytes / disk.scattered_gbps / 1e9 + count * len(self.runs) * disk.request_us / 1e6
        )
        return (packed_bytes, whole) if seconds > WHOLE * whole else (nbytes, seconds)


def _runs(spec: TensorSpec) -> tuple[float, ...]:
    """Return the bytes of each run in which one neuron of a matrix lies."""
    hidden, neurons = spec.shape
    stored = spec.nnz / max(1, neurons)
    runs: list[float] = []
    for array in spec.arrays:
        if array.suffix == "bitmap":
            runs.append(hidden / 8)
        elif array.suffix == "values":
            runs.append(stored * spec.dtype.itemsize)
        elif array.suffix == "bytes":
            runs += [stored] * spec.byte_planes
        elif array.suffix == "planes":
            runs += [stored / 8] * spec.bit_planes
        elif array.suffix == "bundles":
            runs.append(array.nbytes / max(1, neurons))
    return tuple(runs)
