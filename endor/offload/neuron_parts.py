"""Where the neurons of a matrix lie in its record, and what of it is worth reading for some."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import xxhash

from endor.codecs import TILE, Encoded
from endor.codecs.bundles import UNIT
from endor.offload.neuron_blocks import Blocks
from endor.offload.state import State
from endor.planning.activity import BULK, WHOLE
from endor.storage.layout import ALIGN, TensorEntry
from endor.storage.scattered import Spans


@dataclass(frozen=True, slots=True)
class Prices:
    """What requests to a disk cost, compared with reading on.

    Attributes:
        request_bytes: A request, besides its bytes, as bytes of small requests: as many are read
            though nothing needs them, rather than beginning another request.
        slower: How much longer a byte of a small request takes than one of a whole record.
    """

    request_bytes: int
    slower: float


class Parts:
    """Where the neurons of one matrix lie in its record.

    Args:
        state: Its unit, in memory and checked.
        entry: The matrix.
        encoded: The matrix, as views of the unit's bytes.
        prices: What requests cost.
        verify: Remember the sums of the blocks.

    Attributes:
        blocks: Its blocks that are in memory, once there are such.
        encoded: The matrix as views of these, once any were read.
    """

    def __init__(
        self,
        state: State,
        entry: TensorEntry,
        encoded: Encoded,
        *,
        prices: Prices,
        verify: bool,
    ) -> None:
        assert state.place is not None
        self.blocks: Blocks | None = None
        self._prices = prices
        self.unit = state.unit
        self.entry = entry
        self.index = {
            suffix: array.copy() for suffix, array in encoded.arrays.items() if suffix not in BULK
        }
        self.encoded: Encoded | None = None
        self.sums: np.ndarray | None = None
        if verify:
            view = state.place.array[: self.unit.nbytes].data
            self.sums = block_sums(view, range(0, self.unit.nbytes, ALIGN))

    @property
    def nbytes(self) -> int:
        """Memory that it takes."""
        sums = 0 if self.sums is None else self.sums.nbytes
        return sums + sum(array.nbytes for array in self.index.values())

    def needed(self, active: np.ndarray) -> np.ndarray:
        """Return which blocks of the record the neurons `active` need, bool `(blocks,)`."""
        edges = np.zeros(self.unit.nbytes // ALIGN + 1, dtype=np.int64)
        for first, last in self._places(active):
            np.add.at(edges, first, 1)
            np.add.at(edges, last, -1)
        return np.cumsum(edges)[:-1] > 0

    def chances(self, active_share: np.ndarray) -> np.ndarray:
        """Return how likely each block is to be needed, where a neuron is active so often.

        Args:
            active_share: Of the tokens, per neuron; neurons are taken to be independent.
        """
        edges = np.zeros(self.unit.nbytes // ALIGN + 1)
        unlikely = np.log1p(-np.minimum(active_share, 1 - 1e-9))
        for first, last in self._places(np.arange(len(active_share))):
            np.add.at(edges, first, unlikely)
            np.add.at(edges, last, -unlikely)
        # sums of as much added as taken away end near 0, not at 0
        return np.maximum(-np.expm1(np.minimum(np.cumsum(edges)[:-1], 0.0)), 0.0).round(12)

    def spans(self, missing: np.ndarray) -> Spans | None:
        """Return what to read for the blocks `missing`; None where the whole is better."""
        needed = np.flatnonzero(missing)
        if not needed.size:
            return []
        breaks = np.flatnonzero(np.diff(needed) > self._prices.request_bytes // ALIGN + 1)
        begins = needed[np.r_[0, breaks + 1]] * ALIGN
        ends = (needed[np.r_[breaks, needed.size - 1]] + 1) * ALIGN
        cost = int((ends - begins).sum()) + self._prices.request_bytes * len(begins)
        if self._prices.slower * cost > WHOLE * self.unit.nbytes:
            return None
        return list(zip(begins.tolist(), ends.tolist(), strict=True))

    def _places(self, neurons: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield the blocks in which the neurons lie: the first, and one past the last, of each.

        What has no bytes in an array begins and ends with the same block.
        """
        spec = self.entry.spec
        if spec.bundles is not None:
            (bulk,) = (array for array in self.entry.arrays if array.suffix == "bundles")
            offsets = bulk.start + UNIT * self.index["bundle_offsets"].astype(np.int64)
            found = neurons // spec.bundles.rows
            yield offsets[found] // ALIGN, -(-offsets[found + 1] // ALIGN)
            return
        cols = spec.shape[0]  # of the stored matrix: a row is a neuron
        rows = neurons.astype(np.int64)
        first, last = rows * cols // TILE, -(-(rows + 1) * cols // TILE)
        if spec.bitmap:
            ranks = self.index["tile_offsets"].astype(np.int64)
            low, high = ranks[first], ranks[np.minimum(last, spec.n_tiles)]
        else:
            low, high = first * TILE, np.minimum(last * TILE, spec.nnz)
        for array in self.entry.arrays:
            starts, stops = low, high
            planes, size = 1, 1
            if array.suffix == "bitmap":
                starts, stops = first * (TILE // 8), last * (TILE // 8)
            elif array.suffix == "values":
                starts, stops = low * spec.dtype.itemsize, high * spec.dtype.itemsize
            elif array.suffix == "bytes":
                planes, size = spec.byte_planes, spec.nnz
            elif array.suffix == "planes":
                planes, size = spec.bit_planes, spec.plane_nbytes
                starts, stops = low // 8, -(-high // 8)
            else:
                continue
            for plane in range(planes):
                at = array.start + plane * size
                begins = (at + starts) // ALIGN
                yield begins, np.where(stops > starts, -(-(at + stops) // ALIGN), begins)


def block_sums(view: memoryview, starts: "range | list[int]") -> np.ndarray:
    """Return the xxh3_64 of the blocks of `view` that begin at `starts`, u64."""
    digest = xxhash.xxh3_64_intdigest
    return np.array([digest(view[at : at + ALIGN]) for at in starts], dtype=np.uint64)
