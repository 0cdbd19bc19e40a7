"""What planning comes to."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from endor.planning.beside import Way
from endor.planning.cost import Prediction
from endor.planning.kv import KVSetting
from endor.planning.products import Products
from endor.planning.tiers import Exchanges, Placement, Tier
from endor.planning.workload import Reservation, Workload


@dataclass(frozen=True, slots=True)
class Alternative:
    """One way to run a model, and what it would give.

    Attributes:
        way: How units outside VRAM are multiplied.
        batch: Sequences at once.
        kv: Where keys and values are kept.
        expanded: Share of the units that are kept expanded.
        decode_tokens_per_s, prefill_tokens_per_s: What is predicted, of all sequences.
        bound: What limits a decode step.
        placement: Where the units are.
    """

    way: Way
    batch: int
    kv: KVSetting
    expanded: float
    decode_tokens_per_s: float
    prefill_tokens_per_s: float
    bound: str
    placement: Placement


@dataclass(frozen=True, slots=True)
class Plan:
    """A placement, what it costs in memory, and how fast it will be.

    Attributes:
        tiers: Tier per unit.
        staging_bytes: Memory that streamed units pass through.
        slots: Device slots that units outside VRAM pass through.
        reservations: Memory given away first.
        ram_bytes: The budget.
        vram_bytes: The device's budget; 0 on the processor.
        decode: One decode step.
        prefill: The whole prompt in one step.
        load_s: Reading what stays in memory, once.
        dense_decode: The same step of a plain dense model, if that fits the budgets.
        packed_bytes: All units, packed.
        dense_bytes: All units, expanded.
        workload: What was planned for.
        products: How weights are multiplied where the bits need not be torch's.
        host_shares: As in `Placement`.
        exchanges: As in `Placement`.
        kept_bytes: As in `Placement`.
        way: How units outside VRAM are multiplied.
        alternatives: The best ways to run the model, this one among them, the fastest first.
    """

    tiers: Mapping[str, Tier]
    staging_bytes: int
    slots: int
    reservations: tuple[Reservation, ...]
    ram_bytes: int
    vram_bytes: int
    decode: Prediction
    prefill: Prediction
    load_s: float
    dense_decode: Prediction | None
    packed_bytes: int
    dense_bytes: int
    workload: Workload
    products: Products = field(default_factory=Products)
    host_shares: Mapping[str, float] = field(default_factory=dict)
    exchanges: Exchanges | None = None
    kept_bytes: Mapping[str, int] = field(default_factory=dict)
    way: Way = "stream"
    alternatives: tuple[Alternative, ...] = ()

    @property
    def decode_tokens_per_s(self) -> float:
        return self.workload.batch / self.decode.seconds

    @property
    def prefill_tokens_per_s(self) -> float:
        return self.workload.batch * self.workload.prompt / self.prefill.seconds

    @property
    def dense_is_faster(self) -> bool:
        """Whether an ordinary dense model fits and decodes at least as fast."""
        return self.dense_decode is not None and self.dense_decode.seconds <= self.decode.seconds

    @property
    def placement(self) -> Placement:
        """The plan as what moves the units takes it."""
        return Placement(
            self.tiers,
            self.staging_bytes,
            self.slots,
            self.host_shares,
            self.exchanges,
            self.kept_bytes,
        )

    def count(self, tier: Tier) -> int:
        """Return how many units live in `tier`."""
        return sum(found == tier for found in self.tiers.values())
