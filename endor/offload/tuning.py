"""Which way a device multiplies faster by a packed weight: measured once on a card, remembered."""

import threading
from collections.abc import Callable

from endor import machine
from endor.codecs import TensorSpec
from endor.kernels.gpu_product import columns_of
from endor.offload.device import Device

PART = "products"


def name_of(spec: TensorSpec, rows: int) -> str:
    """Return what is told apart: codec, type, shape, bits a weight to a quarter, the kernel."""
    shape = "x".join(map(str, spec.shape))
    bits = round(4 * spec.bits_per_weight) / 4
    return f"{spec.codec} {spec.dtype.name} {shape} {bits:g} {columns_of(rows)}"


class Tuner:
    """The choice between a product from the packed form and expanding it, for one device.

    What was measured on a card of that name is read from and written to `machine`'s cache. Both
    ways are right; only time, and the rounding of the sums, tells them apart.

    Args:
        device: Measures.
    """

    def __init__(self, device: Device) -> None:
        self._device = device
        self._key = machine.digest(device.facts())
        found = machine.load()[PART].get(self._key)
        known = found.items() if isinstance(found, dict) else ()
        self._packed = {name: value for name, value in known if isinstance(value, bool)}
        self._lock = threading.Lock()

    def prefers_packed(
        self,
        spec: TensorSpec,
        rows: int,
        packed: Callable[[], None],
        expanded: Callable[[], None],
    ) -> bool:
        """Return whether the product from the packed form is the faster way.

        Args:
            spec: The weight.
            rows: Rows of the inputs.
            packed: Enqueues that product; run several times where nothing is known.
            expanded: Enqueues the other way, likewise.
        """
        name = name_of(spec, rows)
        known = self._packed.get(name)
        if known is None and self._device.capturing():
            return True  # a captured stream cannot be timed
        if known is None:
            with self._lock:  # another thread's work would be measured, too
                known = self._packed.get(name)
                if known is None:
                    known = self._device.seconds(packed) <= self._device.seconds(expanded)
                    self._packed[name] = known
                    machine.store(PART, self._key, self._packed)
        return known
