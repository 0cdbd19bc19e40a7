"""Reading from disk only what the active neurons of a matrix need.

A matrix that is stored by neuron is first read whole, as any unit is, and checked. What says where
its neurons lie (offsets of tiles, patches) and a checksum of each block of 4096 bytes then stay in
memory: 1 to 2 % of it. From then on a product reads the blocks that its active neurons lie in, into
their own places in one buffer for all such matrices, and each block is compared with its sum.
"""

import os
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Self

import numpy as np
import xxhash

from endor.codecs import TILE, Encoded
from endor.errors import IntegrityError
from endor.offload.ledger import Ledger
from endor.offload.state import State
from endor.planning.machine import known_disk
from endor.planning.tiers import Placement
from endor.planning.units import Unit
from endor.storage import HostBuffer, RecordReader
from endor.storage.layout import ALIGN, TensorEntry
from endor.storage.scattered import Spans, read_spans

WORTH = 0.4
"""Most that parts may cost, of the whole: a whole record is read ahead of its use, while parts are
waited for. With 0.8 models on a disk of 3.6 GB/s became slower."""

BULK = ("bitmap", "values", "bytes", "planes")
"""Arrays of which only parts are read; the others stay in memory."""


def request_bytes(path: Path) -> int:
    """Return what a request to the disk of `path` costs besides its bytes, as bytes.

    As many bytes are read though nothing needs them, rather than beginning another request.
    """
    disk = known_disk(path)
    return int(disk.request_us * 1e3 * disk.read_gbps)


class Parts:
    """Where the neurons of one matrix lie in its record.

    Args:
        state: Its unit, in memory and checked.
        entry: The matrix.
        encoded: The matrix, as views of the unit's bytes.
        request_bytes: What a request costs besides its bytes, as bytes.
        verify: Remember the sums of the blocks.

    Attributes:
        encoded: The matrix as views of the buffer for parts, once it was read there.
    """

    def __init__(
        self,
        state: State,
        entry: TensorEntry,
        encoded: Encoded,
        *,
        request_bytes: int,
        verify: bool,
    ) -> None:
        assert state.place is not None
        self._request_bytes = request_bytes
        self.unit = state.unit
        self.entry = entry
        self.index = {
            suffix: array.copy() for suffix, array in encoded.arrays.items() if suffix not in BULK
        }
        self.encoded: Encoded | None = None
        self.sums: np.ndarray | None = None
        if verify:
            view = state.place.array[: self.unit.nbytes].data
            self.sums = _sums(view, range(0, self.unit.nbytes, ALIGN))

    @property
    def nbytes(self) -> int:
        """Memory that it takes."""
        sums = 0 if self.sums is None else self.sums.nbytes
        return sums + sum(array.nbytes for array in self.index.values())

    def spans(self, active: np.ndarray) -> Spans | None:
        """Return what to read for the neurons `active`; None where the whole is better."""
        spec = self.entry.spec
        cols = spec.shape[0]  # of the stored matrix: a row is a neuron
        rows = active.astype(np.int64)
        first, last = rows * cols // TILE, -(-(rows + 1) * cols // TILE)
        if spec.bitmap:
            ranks = self.index["tile_offsets"].astype(np.int64)
            low, high = ranks[first], ranks[np.minimum(last, spec.n_tiles)]
        else:
            low, high = first * TILE, np.minimum(last * TILE, spec.nnz)
        blocks = self.unit.nbytes // ALIGN
        edges = np.zeros(blocks + 1, dtype=np.int64)
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
            some = stops > starts
            for plane in range(planes):
                at = array.start + plane * size
                np.add.at(edges, (at + starts[some]) // ALIGN, 1)
                np.add.at(edges, -(-(at + stops[some]) // ALIGN), -1)
        needed = np.flatnonzero(np.cumsum(edges)[:-1])
        if not needed.size:
            return []
        breaks = np.flatnonzero(np.diff(needed) > self._request_bytes // ALIGN + 1)
        begins = needed[np.r_[0, breaks + 1]] * ALIGN
        ends = (needed[np.r_[breaks, needed.size - 1]] + 1) * ALIGN
        cost = int((ends - begins).sum()) + self._request_bytes * len(begins)
        if cost > WORTH * self.unit.nbytes:
            return None
        return list(zip(begins.tolist(), ends.tolist(), strict=True))


class NeuronReads:
    """Reads parts of the matrices of one mover, one at a time.

    Args:
        reader: The mover's.
        ledger: Where to count.
        buffer_bytes: The largest record that is read in parts.
        request_bytes: What a request costs besides its bytes, as bytes.
        verify: Check each block that is read.

    Attributes:
        lock: Held while a matrix is read and multiplied by.
        states: Units that were read whole before.
    """

    def __init__(
        self,
        reader: RecordReader,
        ledger: Ledger,
        buffer_bytes: int,
        *,
        request_bytes: int,
        verify: bool,
    ) -> None:
        self.lock = threading.Lock()
        self.states: list[State] = []
        self._reader = reader
        self._ledger = ledger
        self._buffer = HostBuffer(buffer_bytes)
        self._request_bytes = request_bytes
        self._verify = verify
        self._parts: dict[str, Parts] = {}
        self._pid = os.getpid()

    @classmethod
    def of(
        cls,
        units: Sequence[Unit],
        placement: Placement,
        reader: RecordReader,
        ledger: Ledger,
        *,
        verify: bool,
    ) -> Self:
        """Return the reads of those of `units` that lie on disk."""
        found = [
            unit
            for unit in units
            if placement.tiers[unit.name] == "disk"
            and any(unit.layout.tensors[name].spec.transposed for name in unit.tensors)
        ]
        return cls(
            reader,
            ledger,
            max((unit.nbytes for unit in found), default=0),
            request_bytes=request_bytes(found[0].record.path) if found else 0,
            verify=verify,
        )

    @property
    def nbytes(self) -> int:
        """Memory that it takes, the buffer included."""
        return self._buffer.nbytes + sum(parts.nbytes for parts in self._parts.values())

    def known(self, state: State) -> Parts | None:
        """Return what is known of a unit that was read whole before; None in a forked child."""
        return self._parts.get(state.unit.name) if os.getpid() == self._pid else None

    def learn(self, state: State, tensor: str, encoded: Encoded) -> None:
        """Remember where the neurons of a unit lie, which this thread holds now."""
        entry = state.unit.layout.tensors[tensor]
        self._parts[state.unit.name] = Parts(
            state, entry, encoded, request_bytes=self._request_bytes, verify=self._verify
        )
        self.states.append(state)

    def forget(self, state: State) -> None:
        """Let go of a unit."""
        self._parts.pop(state.unit.name, None)

    def read(self, parts: Parts, spans: Spans) -> tuple[Encoded, int]:
        """Return a matrix with its parts read, valid while `lock` is held, and the bytes read.

        Raises:
            ReadError: The bytes did not come.
            IntegrityError: They are others than when the whole was read.
        """
        unit, data = parts.unit, self._buffer.array
        start = time.perf_counter()
        stat = read_spans(self._reader, unit.record, spans, self._buffer)
        stop = end = time.perf_counter()
        if parts.sums is not None:
            starts = np.concatenate(
                [np.arange(a, b, ALIGN) for a, b in spans] or [np.zeros(0, int)]
            )
            found = _sums(data.data, starts.tolist())
            wrong = np.flatnonzero(found != parts.sums[starts // ALIGN])
            if wrong.size:
                raise IntegrityError(
                    f"{unit.record.path}: record {unit.record.name!r} changed at offset "
                    f"{unit.record.offset + int(starts[wrong[0]])} since it was first read; "
                    "something writes to the file: load the model again"
                )
            end = time.perf_counter()
        self._ledger.note_read(unit.name, start, stop, end, stat)
        self._ledger.note_stall(unit.name, start, stat.nbytes)
        if parts.encoded is None:
            whole = unit.layout.bind(parts.entry.name, data[: unit.nbytes])
            parts.encoded = Encoded(whole.spec, {**whole.arrays, **parts.index})
        return parts.encoded, stat.nbytes


def _sums(view: memoryview, starts: "range | list[int]") -> np.ndarray:
    """Return the xxh3_64 of the blocks of `view` that begin at `starts`, u64."""
    digest = xxhash.xxh3_64_intdigest
    return np.array([digest(view[at : at + ALIGN]) for at in starts], dtype=np.uint64)
