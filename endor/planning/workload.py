"""What a model is used for, and the memory that is spoken for by it."""

from collections.abc import Sequence
from dataclasses import dataclass

from endor.errors import ConfigError
from endor.planning.beside import HostCompute
from endor.planning.cost import Product
from endor.planning.kv import KVBytes, KVSetting, kv_bytes
from endor.planning.shape import ModelShape
from endor.planning.unit_cost import UnitCost

WORKSPACE_BYTES = 64 << 20
"""Device memory for what libraries take, and for the rounding of allocations."""


@dataclass(frozen=True, slots=True)
class Reservation:
    """Memory that is spoken for before any unit gets some.

    Attributes:
        what: Its purpose.
        where: `ram` or `vram`.
        nbytes: Its size.
    """

    what: str
    where: str
    nbytes: int


@dataclass(frozen=True, slots=True)
class Workload:
    """What the model will be used for.

    Attributes:
        batch: Sequences at once.
        prompt: Tokens of each prompt.
        context: Tokens that the cache must hold, prompt included.
        product: How weights are multiplied.
        kv: Where keys and values are kept; `auto` takes the first place that fits.
        host_compute: Whether the host may multiply beside a device.
    """

    batch: int = 1
    prompt: int = 128
    context: int = 1024
    product: Product = "exact"
    kv: KVSetting = "device"
    host_compute: HostCompute = "auto"

    def check(self) -> None:
        """Raise `ConfigError` unless the numbers make sense."""
        if min(self.batch, self.prompt) < 1 or self.context < self.prompt:
            raise ConfigError(
                "plan: batch and prompt must be at least 1 and the context must hold the prompt, "
                f"got batch {self.batch}, prompt {self.prompt}, context {self.context}"
            )


def fixed_bytes(
    shape: ModelShape, costs: Sequence[UnitCost], workload: Workload, *, on_device: bool = False
) -> dict[str, int]:
    """Return the memory that computing needs whatever the placement, by purpose."""
    rows = workload.batch * workload.prompt
    scratch = shape.scratch_bytes or max((cost.dense_bytes for cost in costs), default=0)
    out = {
        "cache of keys and values": kv_needs(shape, workload, on_device=on_device).compute,
        "weights outside the units": shape.other_bytes,
        "scratch for expanded units": (2 if on_device else 1) * scratch,
        "activations": rows * shape.activation_bytes_per_token + workload.batch * shape.vocab * 8,
    }
    by_neuron = [cost for cost in costs if cost.by_neuron]
    if by_neuron and workload.product == "direct" and not on_device:
        largest = max(cost.packed_bytes for cost in by_neuron)
        kept = sum(cost.neuron_bytes for cost in by_neuron)
        out["parts of matrices stored by neuron"] = largest + kept
    return out | ({"libraries": WORKSPACE_BYTES} if on_device else {})


def kv_needs(shape: ModelShape, workload: Workload, *, on_device: bool) -> KVBytes:
    """Return the memory of the cache of keys and values, where `workload` puts it."""
    total = shape.kv_bytes_per_token * workload.context * workload.batch
    return kv_bytes(workload.kv, total, shape.layers, beside_device=on_device)
