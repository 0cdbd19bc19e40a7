"""Where a copier gets units from: host memory, or a reader that writes device memory."""

import threading
import time
from collections.abc import Sequence
from typing import Any

import torch

from endor.offload.device import Device
from endor.offload.host_mover import HostMover
from endor.offload.row_split import RowSplit
from endor.offload.source import Pieces, cut_up
from endor.offload.state import State
from endor.planning.tiers import COPY_PIECE_BYTES, Placement
from endor.planning.units import Unit
from endor.storage import RecordReader


class HostSource:
    """A `Source` of the units of one device.

    Args:
        device: Where they are copied to.
        units: All of them, in execution order.
        host: Has those that are copied from host memory.
        split: Which of these the host multiplies in part.
        reader: Reads the others into device memory.
        placement: Where all of them are.
    """

    def __init__(
        self,
        device: Device,
        units: Sequence[Unit],
        host: HostMover,
        split: RowSplit,
        reader: RecordReader,
        placement: Placement,
    ) -> None:
        self._device = device
        self._units = tuple(units)
        self._host = host
        self._split = split
        self._reader = reader
        # A copy that has begun lets no other pass: results of the host would wait for all of it.
        self._in_pieces = "host" in placement.tiers.values()
        self._local = threading.local()

    def acquire(self, unit: int) -> Pieces:
        self._local.start = time.perf_counter()
        state = self._state(unit)
        if state.fixed is None:
            # Taking it gives back this thread's last one, whose copy may still read it.
            pending = getattr(self._local, "pending", None)
            if pending is not None:
                self._device.synchronize(pending)
        bound = self._host.take(state)
        if self._split.whole(unit) is not None:
            pieces: Pieces = self._split.cut(state.unit, bound).pieces
        else:
            assert state.place is not None
            pieces = [(0, state.place.array)]
        return cut_up(pieces, COPY_PIECE_BYTES) if self._in_pieces else pieces

    def issued(self, unit: int, event: Any) -> None:
        start, stop = self._local.start, time.perf_counter()
        state = self._state(unit)
        whole = self._split.whole(unit) is None
        nbytes = state.unit.nbytes if whole else self._split.copied_bytes(state.unit)
        self._host.ledger.note("copy", state.unit.name, start, stop, nbytes)
        if not state.resident:
            self._local.pending = event

    def reads_directly(self, unit: int) -> bool:
        if self._split.whole(unit) is not None:
            return False
        return self._units[unit].name not in self._host.states

    def read_into(self, unit: int, buffer: torch.Tensor) -> int:
        item = self._units[unit]
        stat = self._reader.read(item.record, buffer[: item.nbytes])  # type: ignore[arg-type]
        return stat.nbytes

    def _state(self, unit: int) -> State:
        whole = self._split.whole(unit)
        return self._host.states[self._units[unit if whole is None else whole].name]
