"""The weights of one model on several CUDA devices: a store per device, one to the outside."""

from collections.abc import Sequence
from typing import Any

from endor.offload.device_store import DeviceStore
from endor.offload.ledger import Ledger
from endor.offload.store import Store
from endor.planning.tiers import Placement
from endor.storage import FileLayout


class _Sum:
    """Stands in for the scratch of all stores where its size is asked for."""

    def __init__(self, stores: Sequence[DeviceStore]) -> None:
        self.nbytes = sum(store.device_scratch.nbytes for store in stores)


class DeviceGroup(Store):
    """Stores of one model, each for the weights that are used on its device.

    They share a ledger, and nothing else: each has its own staging, slots, copy stream and reader,
    so that every link is kept busy by itself.

    Args:
        layouts: The checkpoint's files.
        stores: One per device; they count into `ledger`.
        ledger: The counters of all of them.
    """

    def __init__(
        self, layouts: Sequence[FileLayout], stores: Sequence[DeviceStore], ledger: Ledger
    ) -> None:
        self.stores = tuple(stores)
        self.layouts = tuple(layouts)
        self.units = tuple(unit for store in stores for unit in store.units)
        self.unpacked = stores[0].unpacked
        self.reader = stores[0].reader
        self.placement = Placement(
            {name: tier for store in stores for name, tier in store.placement.tiers.items()},
            sum(store.placement.staging_bytes for store in stores),
            sum(store.placement.slots for store in stores),
        )
        self.scratch = _Sum(stores)  # type: ignore[assignment]
        self.weights = {name: weight for store in stores for name, weight in store.weights.items()}
        self._ledger = ledger

    @property
    def ledger(self) -> Ledger:
        return self._ledger

    @property
    def held_nbytes(self) -> int:
        """Bytes that packed records take: on the devices, in RAM, slots and staging."""
        return sum(store.held_nbytes for store in self.stores)

    def preload(self) -> None:
        """Wait until every resident unit is in memory, and expand what is kept expanded."""
        for store in self.stores:
            store.preload()

    def close(self) -> None:
        """Stop reading and release the memory; using a weight afterwards is a BackendError."""
        for store in self.stores:
            store.close()

    def report(self) -> dict[str, Any]:
        """Return one report per device, and the counters of all; all plain data."""
        reports = [store.report() for store in self.stores]
        return {
            "tiers": self.count_tiers(),
            "staging_bytes": sum(report["staging_bytes"] for report in reports),
            "scratch_bytes": self.scratch.nbytes,
            "unpacked_at_load": list(self.unpacked),
            "reader": reports[0]["reader"],
            "counters": self.ledger.since(type(self.ledger.counters)()),
            "devices": reports,
        }
