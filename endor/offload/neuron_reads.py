"""Reading from disk only what the active neurons of a matrix need.

A matrix that is stored by neuron is first read whole, as any unit is, and checked. What says where
its neurons lie (offsets of tiles, patches) and a checksum of each block of 4096 bytes then stay in
memory: 1 to 2 % of it. From then on a product reads the blocks that its active neurons lie in and
that are not in memory, into their own places, and each block is compared with its sum.
"""

import os
import threading
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Self

import numpy as np

from endor.checkpoint.neuron_counts import NeuronCounts, active_shares
from endor.codecs import Encoded
from endor.errors import IntegrityError, SlowWarning
from endor.offload.ledger import Ledger
from endor.offload.neuron_blocks import BlockMemory, busiest, whole_pages
from endor.offload.neuron_parts import Parts, Prices, block_sums
from endor.offload.neuron_passing import PassingMemory, pass_through
from endor.offload.state import State
from endor.planning.machine import known_disk
from endor.planning.tiers import Placement
from endor.planning.units import Unit
from endor.storage import RecordReader
from endor.storage.layout import ALIGN
from endor.storage.scattered import Spans, read_spans


def prices(path: Path) -> Prices:
    """Return what requests to the disk of `path` cost."""
    disk = known_disk(path)
    return Prices(
        request_bytes=int(disk.request_us * 1e3 * disk.scattered_gbps),
        slower=max(1.0, disk.read_gbps / disk.scattered_gbps),
    )


class NeuronReads:
    """Reads parts of the matrices of one mover, one at a time, and keeps those of busy neurons.

    Args:
        reader: The mover's.
        ledger: Where to count.
        buffer_bytes: The largest record that is read in parts.
        prices: What requests cost.
        verify: Check each block that is read.
        kept_bytes: Memory for the busiest blocks of a unit, by its name.
        counts: How often neurons are active; all alike where it is not known.
        units_bytes: All records that are read in parts.

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
        prices: Prices,
        verify: bool,
        kept_bytes: Mapping[str, int] | None = None,
        counts: NeuronCounts | None = None,
        units_bytes: int = 0,
    ) -> None:
        self.lock = threading.Lock()
        self.states: list[State] = []
        self._reader = reader
        self._ledger = ledger
        self._kept_bytes = kept_bytes or {}
        self._units_bytes, self._largest = units_bytes, buffer_bytes
        self._memory = BlockMemory(0)
        self.limit(buffer_bytes)
        self._prices = prices
        self._verify = verify
        self._counts = counts
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
        counts: NeuronCounts | None = None,
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
            prices=prices(found[0].record.path) if found else Prices(0, 1.0),
            verify=verify,
            kept_bytes={unit.name: placement.kept_bytes.get(unit.name, 0) for unit in found},
            counts=counts,
            units_bytes=sum(unit.nbytes for unit in found),
        )

    @property
    def nbytes(self) -> int:
        """Memory that it takes, or may."""
        return self._memory.nbytes + sum(parts.nbytes for parts in self._parts.values())

    def limit(self, nbytes: int) -> None:
        """Have blocks that need not stay take so much memory, or what a product needs.

        Before anything was read.
        """
        assert not self.states
        if not any(self._kept_bytes.values()) and pass_through(self._units_bytes, nbytes):
            self._memory = PassingMemory(self._largest)
        else:
            self._memory = BlockMemory(nbytes)

    def known(self, state: State) -> Parts | None:
        """Return what is known of a unit that was read whole before; None in a forked child."""
        return self._parts.get(state.unit.name) if os.getpid() == self._pid else None

    def learn(self, state: State, tensor: str, encoded: Encoded) -> None:
        """Remember where the neurons of a unit lie, which this thread holds now.

        Warns:
            SlowWarning: The system sets no addresses aside: it is read whole each time.
        """
        entry, unit = state.unit.layout.tensors[tensor], state.unit
        parts = Parts(state, entry, encoded, prices=self._prices, verify=self._verify)
        kept = np.zeros(unit.nbytes // ALIGN, dtype=bool)
        room = self._kept_bytes.get(unit.name, 0)
        if room:
            share = active_shares(self._counts, entry.name, entry.spec.shape[1])
            kept = busiest(parts.chances(share), room)
        assert state.place is not None
        with self.lock:
            try:
                parts.blocks = self._memory.add(unit, state.place.array[: unit.nbytes], kept)
            except OSError as error:
                warnings.warn(
                    f"{unit.name}: no addresses for a mapping of {unit.nbytes} bytes ({error}), so "
                    "that it is read whole for each token; raise the limit (ulimit -v, "
                    "vm.overcommit_memory), or leave more of the model in memory",
                    SlowWarning,
                    stacklevel=2,
                )
                return
            self._parts[unit.name] = parts
            self.states.append(state)

    def forget(self, state: State) -> None:
        """Let go of a unit."""
        with self.lock:
            self._parts.pop(state.unit.name, None)
            self._memory.remove(state.unit.name)

    def read(self, parts: Parts, active: np.ndarray) -> Encoded | None:
        """Return a matrix with the blocks of the neurons `active` in memory.

        Called, and valid, while `lock` is held; None where the whole is better read.

        Raises:
            ReadError: The bytes did not come.
            IntegrityError: They are others than when the whole was read.
        """
        unit, blocks = parts.unit, parts.blocks
        assert blocks is not None
        needed = parts.needed(active)
        missing = whole_pages(needed & ~blocks.there)
        spans = parts.spans(missing)
        if spans is None:
            return None
        read = np.zeros_like(missing)
        for begin, end in spans:
            read[begin // ALIGN : end // ALIGN] = True
        self._memory.make_room(unit.name, read, needed)
        nbytes = self._fetch(parts, spans, blocks.array, read) if spans else 0
        counters = self._ledger.counters
        counters.skipped_bytes += unit.nbytes - nbytes
        counters.neuron_bytes += int(np.count_nonzero(needed)) * ALIGN
        counters.neuron_hit_bytes += int(np.count_nonzero(needed & ~missing)) * ALIGN
        if parts.encoded is None:
            whole = unit.layout.bind(parts.entry.name, blocks.array)
            parts.encoded = Encoded(whole.spec, {**whole.arrays, **parts.index})
        return parts.encoded

    def _fetch(self, parts: Parts, spans: Spans, data: np.ndarray, read: np.ndarray) -> int:
        """Read `spans` of a record to their places and check them; return the bytes."""
        unit = parts.unit
        start = time.perf_counter()
        try:
            stat = read_spans(self._reader, unit.record, spans, data)
            stop = end = time.perf_counter()
            if parts.sums is not None:
                places = np.flatnonzero(read)
                found = block_sums(data.data, (places * ALIGN).tolist())
                wrong = np.flatnonzero(found != parts.sums[places])
                if wrong.size:
                    at = int(places[wrong[0]]) * ALIGN
                    raise IntegrityError(
                        f"{unit.record.path}: record {unit.record.name!r} changed at offset "
                        f"{unit.record.offset + at} since it was first read; something writes to "
                        "the file: load the model again"
                    )
                end = time.perf_counter()
        except BaseException:
            self._memory.spoil(unit.name, read)
            raise
        self._memory.note_read(unit.name, read)
        self._ledger.note_read(unit.name, start, stop, end, stat)
        self._ledger.note_stall(unit.name, start, stat.nbytes)
        return stat.nbytes
