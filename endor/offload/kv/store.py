"""Keys and values as scheduled tasks: loaded before their layer runs, saved behind it.

                  model thread   ... layer 3 ........ layer 4 ........ layer 5 ...
                  loaders        load 4 . save 3 .    load 5 . save 4 .

The kinds of tasks are those of PIPO (arXiv 2504.03664): computing on the model's thread, loads of
weights, loads and saves of keys and values on the mover's loader threads, in one queue, the most
urgent first. A task that the model needs before a loader took it up runs on the model's thread; so
nothing waits for what has not begun, and no order of layers blocks.
"""

import time
from collections.abc import Callable

import torch

from endor.errors import EndorError, ShapeError
from endor.offload.device import Device
from endor.offload.kv.media import FileAccess, FileMedium, RamMedium
from endor.offload.kv.tasks import Layer, Slot, Task
from endor.offload.kv.transfers import Transfers
from endor.offload.ledger import Ledger
from endor.offload.state import AHEAD, KEYS
from endor.planning.kv import SLOTS

PENDING_BYTES = 64 << 20
"""Records that may wait to be saved; more are saved by the model's thread at once."""

Post = Callable[[int, Callable[[], None]], None]


class KVStore:
    """Records of all layers of one cache; used by one thread at a time.

    Args:
        layers: Number of layers, which are used in order and in cycles.
        device: Where the model computes, when that is not the processor.
        ram_bytes: Host memory for records; layers beyond it go to files, spread through the depth
            of the model. None sets no limit.
        post: Takes tasks with a priority and runs them on other threads, `Mover.post`; without it
            they run when their result is needed.
        ledger: Where to count.
        access: How files are made, read and written.
    """

    def __init__(
        self,
        layers: int,
        *,
        device: Device | None = None,
        ram_bytes: int | None = None,
        post: Post | None = None,
        ledger: Ledger | None = None,
        access: FileAccess | None = None,
    ) -> None:
        self.ledger = ledger or Ledger()
        self._device = device
        self._transfers = Transfers(device, self.ledger)
        self._ram_limit = ram_bytes
        self._post = post or (lambda priority, run: None)
        self._access = access or FileAccess()
        self._layers = [Layer(index, device) for index in range(layers)]
        self._slots = [Slot(device) for _ in range(SLOTS)]
        self._spilling = sorted(range(layers), key=_spread)

    def __len__(self) -> int:
        return len(self._layers)

    @property
    def ram_bytes(self) -> int:
        """Host memory in which records stay."""
        return sum(layer.medium.ram_bytes for layer in self._layers if layer.medium is not None)

    @property
    def file_layers(self) -> int:
        """Layers whose records stay in a file."""
        return sum(isinstance(layer.medium, FileMedium) for layer in self._layers)

    def tokens(self, index: int) -> int:
        """Return the number of records that a layer has."""
        return self._layers[index].tokens

    def append(self, index: int, records: torch.Tensor) -> None:
        """Add records behind a layer's others, and save them later.

        Args:
            index: The layer.
            records: `(tokens, record bytes)`, u8, contiguous, where the model computes, written on
                the caller's current stream; not changed afterwards.

        Raises:
            ShapeError: Records of another size than before.
            BackendError: They could not be saved.
        """
        layer, made = self._layers[index], None
        if layer.medium is None:
            layer.medium = self._medium(records.shape[1])
        if records.shape[1] != layer.medium.record_bytes:
            raise ShapeError(
                f"layer {index}: keys and values of a token must have {layer.medium.record_bytes} "
                f"bytes as before, got {records.shape[1]}: clear the cache first"
            )
        self._give_up(layer)
        if self._device is not None:
            made = self._device.event()
            self._device.record_compute(made)
        with layer.lock:
            layer.pending.append((records, made))
        layer.tokens += len(records)
        self._spill(layer)
        waiting = sum(item.numel() for one in self._layers for item, _ in one.pending)
        at_once = self._device is None and isinstance(layer.medium, RamMedium)
        if at_once or waiting > PENDING_BYTES:
            self._transfers.save(layer)
        else:
            self._post(AHEAD, Task(lambda: self._transfers.save(layer)).run)

    def prefetch(self, index: int) -> None:
        """Have a layer's records loaded, unless all slots are full of what will be used."""
        layer = self._layers[index]
        if layer.slot is not None or not layer.tokens or not self._passes_slot(layer):
            return
        free = [slot for slot in self._slots if slot.layer is None]
        if free:
            self._load(layer, free[0])

    def take(self, index: int) -> list[torch.Tensor]:
        """Return a layer's records, waiting for them; `release` gives them back.

        Returns:
            Pieces of `(tokens, record bytes)`, u8, where the model computes, in order; to be read
            on the caller's current stream.

        Raises:
            ReadError: They could not be read.
            BackendError: They could not be saved before.
        """
        layer = self._layers[index]
        if not layer.tokens:
            return []
        assert layer.medium is not None
        shape = (-1, layer.medium.record_bytes)
        if not self._passes_slot(layer):
            self._transfers.save(layer)
            assert isinstance(layer.medium, RamMedium)
            return [
                torch.from_numpy(view).view(shape) for view in layer.medium.views(0, layer.tokens)
            ]
        slot = self._loaded(layer)
        nbytes = layer.tokens * layer.medium.record_bytes
        if self._device is not None:
            self._device.await_in_compute(slot.ready)
            assert slot.buffer is not None
            return [slot.buffer[:nbytes].view(shape)]
        assert slot.host is not None
        return [torch.from_numpy(slot.host.array[:nbytes]).view(shape)]

    def release(self, index: int) -> None:
        """Give back what `take` returned; work enqueued so far still reads it."""
        slot = self._layers[index].slot
        if slot is not None:
            self._vacate(slot)

    def crop(self, index: int, tokens: int) -> None:
        """Forget all but a layer's first `tokens`.

        Raises:
            BackendError: Records could not be saved.
        """
        layer = self._layers[index]
        if tokens >= layer.tokens:
            return
        self._settle(layer)  # what was loaded begins with the records that stay
        self._transfers.save(layer)
        assert layer.medium is not None
        if layer.copied is not None and self._device is not None:
            self._device.synchronize(layer.copied)
        with layer.lock:
            layer.medium.truncate(tokens)
            layer.tokens = layer.saved = tokens

    def clear(self, index: int) -> None:
        """Forget a layer's records, and their size."""
        layer = self._layers[index]
        self._give_up(layer)
        if layer.copied is not None and self._device is not None:
            self._device.synchronize(layer.copied)
        with layer.lock:
            layer.pending.clear()
            layer.tokens = layer.saved = 0
            if layer.medium is not None:
                layer.medium.close()
                layer.medium = None

    def close(self) -> None:
        """Forget everything and give all memory back; the store can be used again."""
        for index in range(len(self._layers)):
            self.clear(index)
        for slot in self._slots:
            slot.unpin()
            slot.buffer = None

    # ---- on the model's thread -----------------------------------------------------------------

    def _passes_slot(self, layer: Layer) -> bool:
        """Whether records are moved before they are used: all but those in RAM on a processor."""
        return self._device is not None or isinstance(layer.medium, FileMedium)

    def _medium(self, record_bytes: int) -> RamMedium | FileMedium:
        if self._ram_limit == 0:
            return FileMedium(record_bytes, self._access)
        return RamMedium(record_bytes, self._device)

    def _load(self, layer: Layer, slot: Slot) -> None:
        assert layer.medium is not None
        tokens = layer.tokens
        slot.reserve(tokens * layer.medium.record_bytes, host=isinstance(layer.medium, FileMedium))
        slot.layer, layer.slot = layer, slot
        slot.task = Task(lambda: self._transfers.fill(layer, slot, tokens))
        self._post(KEYS, slot.task.run)

    def _loaded(self, layer: Layer) -> Slot:
        """Return the slot that a layer's records are in, waiting for them."""
        counters, start = self.ledger.counters, time.perf_counter()
        if layer.slot is None:
            counters.kv_misses += 1
            self._load(layer, self._free_slot())
        slot = layer.slot
        assert slot is not None
        assert slot.task is not None
        if slot.task.done and slot.task.error is None:
            counters.kv_hits += 1
            return slot
        try:
            slot.task.finish()
        except EndorError:
            self._vacate(slot)
            raise
        stop = time.perf_counter()
        counters.kv_stall_s += stop - start
        self.ledger.note("stall", f"keys and values {layer.index}", start, stop, 0)
        return slot

    def _free_slot(self) -> Slot:
        """Return a slot for what is needed now; a load that nobody waits for gives way."""
        for slot in self._slots:
            if slot.layer is None:
                return slot
        slot = self._slots[0]
        assert slot.layer is not None
        self._give_up(slot.layer)
        return slot

    def _settle(self, layer: Layer) -> None:
        """Give up a load that has not begun, wait for one that has."""
        if layer.slot is not None and layer.slot.task is not None and not layer.slot.task.settle():
            self._vacate(layer.slot)

    def _give_up(self, layer: Layer) -> None:
        """Have no load of a layer, done or not."""
        self._settle(layer)
        if layer.slot is not None:
            self._vacate(layer.slot)

    def _vacate(self, slot: Slot) -> None:
        if slot.layer is not None:
            slot.layer.slot = None
        slot.layer = slot.task = None
        self._slots.remove(slot)  # the one that was used longest ago gives way first
        self._slots.append(slot)

    def _spill(self, growing: Layer) -> None:
        """Move layers to files until all fit the limit, the one that grows included."""
        limit = self._ram_limit
        while limit and isinstance(growing.medium, RamMedium):
            if self.ram_bytes + growing.medium.growth_bytes(growing.tokens) <= limit:
                return
            index = next(
                at for at in self._spilling if isinstance(self._layers[at].medium, RamMedium)
            )
            layer = self._layers[index]
            assert isinstance(layer.medium, RamMedium)
            self._move(layer, layer.medium)

    def _move(self, layer: Layer, old: RamMedium) -> None:
        self._give_up(layer)
        self._transfers.save(layer)
        if layer.copied is not None and self._device is not None:
            self._device.synchronize(layer.copied)
        medium, at = FileMedium(old.record_bytes, self._access), 0
        start = time.perf_counter()
        with layer.lock:
            for view in old.views(0, layer.saved):
                medium.write(at, view)
                at += view.nbytes // old.record_bytes
            layer.medium = medium
        old.close()
        self._transfers.count("kv save", layer, start, at * old.record_bytes)


def _spread(index: int) -> float:
    """Return the radical inverse: sorted by it, numbers are spread however many are taken."""
    out, unit = 0.0, 0.5
    while index:
        out += unit * (index & 1)
        index >>= 1
        unit /= 2
    return out
