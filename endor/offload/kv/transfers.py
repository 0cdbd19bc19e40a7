"""Loads and saves of one layer's keys and values, on any thread."""

import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch

from endor.offload.device import Device
from endor.offload.kv.media import FileMedium, RamMedium
from endor.offload.kv.tasks import Layer, Slot
from endor.offload.ledger import Ledger
from endor.storage import HostBuffer


class Transfers:
    """Moves records between where a layer is used and the medium that it stays in.

    Args:
        device: Where the model computes, when that is not the processor.
        ledger: Where to count.
    """

    def __init__(self, device: Device | None, ledger: Ledger) -> None:
        self._device = device
        self._ledger = ledger

    def save(self, layer: Layer) -> None:
        """Bring a layer's pending records home; what fails stays pending."""
        device = self._device
        with layer.lock, self.entered():
            medium = layer.medium
            while layer.pending and medium is not None:
                records, made = layer.pending[0]
                start, count = time.perf_counter(), len(records)
                if device is None:
                    medium.write(layer.saved, records.numpy().reshape(-1))
                else:
                    device.await_in_copy(made)
                    if isinstance(medium, RamMedium):
                        self._copy_back(medium.views(layer.saved, layer.saved + count), records)
                    else:
                        passage = HostBuffer(records.numel())
                        self._copy_back([passage.array], records)
                        medium.write(layer.saved, passage.array)
                layer.saved += count
                layer.pending.popleft()
                self.count("kv save", layer, start, records.numel())

    def entered(self) -> AbstractContextManager[None]:
        """Make the device the calling thread's, where there is one."""
        return self._device.current() if self._device is not None else nullcontext()

    def _copy_back(self, views: Sequence[np.ndarray], records: torch.Tensor) -> None:
        """Copy from the device to host memory and return when it is there."""
        device, flat, at = self._device, records.view(-1), 0
        assert device is not None
        for view in views:
            device.copy_back(view, flat[at : at + view.nbytes])
            at += view.nbytes
        event = device.event()
        device.record_copy(event)
        device.synchronize(event)

    def fill(self, layer: Layer, slot: Slot, tokens: int) -> None:
        """Load a layer's first `tokens` into a slot."""
        self.save(layer)
        device, medium = self._device, layer.medium
        assert medium is not None
        start, nbytes = time.perf_counter(), tokens * medium.record_bytes
        with layer.lock, self.entered():
            if isinstance(medium, FileMedium):
                assert slot.host is not None
                if device is not None:
                    device.synchronize(slot.ready)  # the last copy from this memory
                medium.read(0, slot.host.array[:nbytes])
                views = [slot.host.array[:nbytes]]
            else:
                views = medium.views(0, tokens)
            if device is not None:
                assert slot.buffer is not None
                device.await_in_copy(slot.granted)
                at = 0
                for view in views:
                    device.copy(slot.buffer[at : at + view.nbytes], view)
                    at += view.nbytes
                device.record_copy(slot.ready)
                device.record_copy(layer.copied)
        self.count("kv load", layer, start, nbytes)

    def count(self, kind: Any, layer: Layer, start: float, nbytes: int) -> None:
        """Count a load or save that ended now."""
        counters, stop = self._ledger.counters, time.perf_counter()
        if kind == "kv load":
            counters.kv_loads += 1
            counters.kv_load_bytes += nbytes
            counters.kv_load_s += stop - start
        else:
            counters.kv_saves += 1
            counters.kv_save_bytes += nbytes
            counters.kv_save_s += stop - start
        self._ledger.note(kind, f"keys and values {layer.index}", start, stop, nbytes)
