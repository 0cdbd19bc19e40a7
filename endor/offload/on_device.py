"""A unit where a device multiplies it, and the device memory that experts take in turn."""

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from endor.kernels import gpu_product
from endor.kernels.gpu import DeviceEncoded
from endor.offload.row_split import Cut
from endor.offload.slots import Slot
from endor.planning.units import Unit


@dataclass(frozen=True, slots=True)
class OnDevice:
    """A unit on the device, for the caller until it is given back.

    Attributes:
        unit: The unit.
        storage: Its record, u8, on the device.
        slot: Where it lies, unless it lives there.
        segments: `segment_nnz` of its tensors, where known.
        cut: Which of its rows they are, when not all.
        home: Where it lies while it is there, if experts change places.
    """

    unit: Unit
    storage: torch.Tensor
    slot: Slot | None
    segments: dict[str, int] = field(default_factory=dict)
    cut: Cut | None = None
    home: "Home | None" = None

    def bind(self, tensor: str) -> DeviceEncoded:
        """Return a stored tensor, or its first rows, as views of the memory here."""
        if self.cut is not None:
            spec, offsets = self.cut.tensors[tensor]
            return DeviceEncoded(spec, self.storage, offsets)
        entry = self.unit.layout.tensors[tensor]
        starts = {array.suffix: array.start for array in entry.arrays}
        segment = self.segments.get(tensor, gpu_product.SEGMENT)
        return DeviceEncoded(entry.spec, self.storage, starts, segment)


@dataclass(eq=False, slots=True)
class Home:
    """Device memory in which one expert at a time stays; see `endor.offload.hot_experts`.

    Attributes:
        buffer: The memory.
        kind: Which experts fit: those of one size.
        ready: Recorded behind each piece that is copied there.
        first: Index of the expert to begin with; None once that was tried.
        held: The expert that is there, for those who take it.
        holders: Takes that were not given back.
        uses: Event per compute stream, recorded behind its last use since the copy.
    """

    buffer: torch.Tensor
    kind: int
    ready: Any
    first: int | None
    held: OnDevice | None = None
    holders: int = 0
    uses: dict[Hashable, Any] = field(default_factory=dict)


def segments_of(unit: Unit, data: np.ndarray) -> dict[str, int]:
    """Return how full the products' segments are: known only while the bytes are on the host."""
    out = {}
    for name in unit.tensors:
        spec = unit.layout.tensors[name].spec
        if gpu_product.product_refusal(spec) is None:
            bitmap = unit.layout.bind(name, data).arrays.get("bitmap")
            out[name] = gpu_product.segment_nnz(spec, bitmap)
    return out
