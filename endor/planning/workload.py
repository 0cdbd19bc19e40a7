"""What a model is used for, and the memory that is spoken for by it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

from endor.errors import ConfigError
from endor.planning.beside import HostCompute
from endor.planning.cost import Product
from endor.planning.kv import KVBytes, KVSetting, kv_bytes
from endor.planning.shape import ModelShape
from endor.planning.unit_cost import UnitCost

WORKSPACE_BYTES = 64 << 20
"""Device memory for what libraries take, and for the rounding of allocations."""


Experts = Literal["exact", "lossy"]
"""Whether experts are those that routers choose, or others may take their place."""


def check_experts(wish: object) -> None:
    """Raise `ConfigError` unless it is one."""
    if wish not in get_args(Experts):
        raise ConfigError(f"experts must be exact or lossy, got {wish!r:.40}")


def check_predict(wish: object, *, exact: bool) -> None:
    """Raise `ConfigError` unless it is a truth value, and not asked for with exact products."""
    if not isinstance(wish, bool):
        raise ConfigError(f"predict must be True or False, got {wish!r:.40}")
    if wish and exact:
        raise ConfigError("predict=True is lossy, and goes with exact=False (--fast)")


def no_experts() -> ConfigError:
    """Return what to raise where experts shall be lossy and there are none."""
    return ConfigError(
        "experts='lossy' is for mixtures of experts with packed experts, and this model has none: "
        "leave it at 'exact'"
    )


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
        experts: Whether experts may be replaced by others that are at hand.
        predict: Whether rows of first matrices are left out whose neurons are predicted idle.
        named: By matrix with a predictor, the share of its rows that is expected to be multiplied,
            and the bytes that the predictor takes in memory.
    """

    batch: int = 1
    prompt: int = 128
    context: int = 1024
    product: Product = "exact"
    kv: KVSetting = "device"
    host_compute: HostCompute = "auto"
    experts: Experts = "exact"
    predict: bool = False
    named: Mapping[str, tuple[float, int]] = field(default_factory=dict)

    def check(self, costs: Sequence[UnitCost] | None = None) -> None:
        """Raise `ConfigError` unless it makes sense, for units whose costs are these."""
        if min(self.batch, self.prompt) < 1 or self.context < self.prompt:
            raise ConfigError(
                "plan: batch and prompt must be at least 1 and the context must hold the prompt, "
                f"got batch {self.batch}, prompt {self.prompt}, context {self.context}"
            )
        if self.experts == "lossy" and costs is not None and all(c.scheduled for c in costs):
            raise no_experts()


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
    if workload.named:
        out["predictors of neurons"] = sum(nbytes for _, nbytes in workload.named.values())
    return out | ({"libraries": WORKSPACE_BYTES} if on_device else {})


def kv_needs(shape: ModelShape, workload: Workload, *, on_device: bool) -> KVBytes:
    """Return the memory of the cache of keys and values, where `workload` puts it."""
    total = shape.kv_bytes_per_token * workload.context * workload.batch
    return kv_bytes(workload.kv, total, shape.layers, beside_device=on_device)
