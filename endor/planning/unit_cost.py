"""What one unit costs on one machine, whatever tier it is in."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from endor.checkpoint.neuron_counts import ASSUMED_ACTIVE, NeuronCounts
from endor.codecs import TensorSpec
from endor.codecs.coding import VALUE_DTYPES
from endor.planning.activity import BULK, Activity
from endor.planning.constants import Machine
from endor.planning.device_rates import Rates, modelled
from endor.planning.shape import ModelShape
from endor.planning.tiers import Tier
from endor.planning.units import Unit

SMALL_WEIGHTS = 1 << 20
"""Up to so many weights a matrix is small: its work is not shared by threads that sleep, and what a
call costs counts. Its rates are measured on such a one."""
PRODUCT_ROW_COST = 0.3
"""What each further row adds to a packed product where it was not measured: unpacking is shared,
arithmetic is not."""
ROWS_APART = 1.7
"""What a row costs that lies apart from the others which are multiplied, of one among all
(`scripts/chosen_rows_bench.py`: 1.9 at a tenth of the rows, 1.6 at a third)."""

NEURONS_READ = 0.25
"""Share of a matrix stored by neuron that a product is assumed to take the time of: with 5 to 10 %
of the neurons active, and rows that lie apart. It is not known before the model runs."""


@dataclass(frozen=True, slots=True)
class Decoded:
    """A unit whose entropy code is undone.

    Attributes:
        nbytes: What it takes in memory.
        product_s: One product.
        row_cost: As of `UnitCost`.
    """

    nbytes: int
    product_s: float
    row_cost: float


@dataclass(frozen=True, slots=True)
class UnitCost:
    """A unit as the cost model sees it: sizes, and processor seconds of one use.

    Attributes:
        name: The unit.
        packed_bytes: Bytes that one read or copy moves.
        dense_bytes: Bytes when expanded.
        weights: Elements.
        expand_s: One expansion.
        linear_s: One dense product at batch 1.
        product_s: One product from the packed form.
        use: Share of decode steps that need it.
        scheduled: Whether it can be read ahead (experts cannot).
        row_cost: What each further row adds to a packed product, as a share of the first.
        multiplies: Whether the processor multiplies all of it from the packed form.
        neuron_bytes: Of a matrix stored by neuron, what stays in memory to read parts of it.
        activity: Of a matrix stored by neuron, how busy its neurons are, where that was counted.
        assumed: The same where nothing was counted: all alike.
        decoded: What it costs in tier `decoded`, where it can be there.
        device_rates: 10^9 weights a second of the device's product from the packed form, of one
            row and of most; `None` where it expands, or nothing is known.
    """

    name: str
    packed_bytes: int
    dense_bytes: int
    weights: int
    expand_s: float
    linear_s: float
    product_s: float
    use: float
    scheduled: bool
    row_cost: float = PRODUCT_ROW_COST
    multiplies: bool = True
    neuron_bytes: int = 0
    device_rates: tuple[float, float] | None = None
    activity: Activity | None = None
    assumed: Activity | None = None
    decoded: Decoded | None = None

    @property
    def by_neuron(self) -> bool:
        """Whether few rows touch only a part of it."""
        return self.neuron_bytes > 0

    def placed(self, tier: Tier) -> "UnitCost":
        """Return the cost of the unit as it is in a tier."""
        if tier != "decoded" or self.decoded is None:
            return self
        return replace(self, product_s=self.decoded.product_s, row_cost=self.decoded.row_cost)


def kind_of(spec: TensorSpec) -> str:
    """Return the kind of stored tensor that a measured rate is of."""
    return f"{spec.codec}+bitmap" if spec.bitmap else spec.codec


def _decoded(unit: Unit, machine: Machine) -> Decoded | None:
    """Return the cost of a unit in tier `decoded`, if all of it can be there."""
    seconds = further = 0.0
    for name in unit.tensors:
        stored = unit.layout.tensors[name].spec
        spec = stored.decoded
        if spec is stored or not _multiplies(spec):
            return None
        kind = kind_of(spec)
        rate = machine.small_product_gbps.get(kind) if spec.numel <= SMALL_WEIGHTS else 0.0
        one = spec.nbytes / (rate or machine.product_gbps[kind]) / 1e9
        seconds += one
        further += one * machine.product_row_cost.get(kind, PRODUCT_ROW_COST)
    return Decoded(unit.decoded_nbytes, seconds, further / seconds) if seconds else None


def _multiplies(spec: TensorSpec) -> bool:
    return (
        spec.codec in ("raw", "exp", "int")
        and len(spec.shape) == 2
        and spec.dtype.name in VALUE_DTYPES
    )


def _device_rates(unit: Unit, rates: Rates) -> tuple[float, float] | None:
    """Return the rates of a device's product with a unit, if its tensors are of one such kind."""
    specs = [unit.layout.tensors[name].spec for name in unit.tensors]
    kinds = {kind_of(spec) for spec in specs}
    if len(kinds) != 1 or not all(_multiplies(spec) for spec in specs):
        return None
    if any(spec.transposed or spec.shape[1] % 32 for spec in specs):
        return None
    return rates.get(kinds.pop())


def _kept_bytes(spec: TensorSpec) -> int:
    """Return what stays in memory of a matrix read by neuron: a sum a block, and offsets."""
    small = sum(array.nbytes for array in spec.arrays if array.suffix not in BULK)
    return small + spec.nbytes // 512 + 16


def _activity(unit: Unit, counts: NeuronCounts | None) -> tuple[Activity | None, Activity | None]:
    """Return how busy the neurons of a matrix that is a unit are: as counted, and as assumed."""
    if len(unit.tensors) != 1 or unit.shared:
        return None, None
    (name,) = unit.tensors
    spec = unit.layout.tensors[name].spec
    if not spec.transposed:
        return None, None
    if counts is None or name not in counts.active:
        return None, Activity.alike(spec, ASSUMED_ACTIVE)
    found = Activity.of(spec, counts.active[name], counts.tokens)
    return found, found


def unit_costs(
    units: Sequence[Unit],
    machine: Machine,
    shape: ModelShape,
    counts: NeuronCounts | None = None,
    named: Mapping[str, tuple[float, int]] | None = None,
) -> tuple[UnitCost, ...]:
    """Return the cost of each unit on `machine`.

    Args:
        units: They.
        machine: Where they are used.
        shape: Of the model.
        counts: Those of the checkpoint.
        named: As `Workload.named`: what predictors leave of matrices.
    """
    out = []
    on_device = modelled(machine.link.name) if machine.link else {}
    for unit in units:
        expand = product = linear = further = 0.0
        weights = neuron_bytes = 0
        for name in unit.tensors:
            spec = unit.layout.tensors[name].spec
            weights += spec.numel
            kind, small = kind_of(spec), spec.numel <= SMALL_WEIGHTS
            rate = machine.small_linear_gbps if small else 0.0
            dense_bytes = spec.numel * shape.itemsize or spec.dense_nbytes
            linear += dense_bytes / (rate or machine.linear_gbps) / 1e9
            if kind == "dense":  # copied to the scratch, since its record is only passing through
                expand += spec.nbytes / machine.copy_gbps / 1e9
                product += spec.nbytes * (1 / machine.copy_gbps + 1 / machine.linear_gbps) / 1e9
                continue
            expanding = machine.small_expand_gbps if small else {}
            multiplying = machine.small_product_gbps if small else {}
            expand_gbps = expanding.get(kind) or machine.expand_gbps[kind]
            expand += spec.dense_nbytes / expand_gbps / 1e9
            one = spec.nbytes / (multiplying.get(kind) or machine.product_gbps[kind]) / 1e9
            if spec.transposed:
                one *= NEURONS_READ
                neuron_bytes += _kept_bytes(spec)
            if named and name in named:
                share, nbytes = named[name]
                one = one * min(1.0, ROWS_APART * share) + nbytes / machine.read_gbps / 1e9
            product += one
            further += one * machine.product_row_cost.get(kind, PRODUCT_ROW_COST)
        dense_bytes = weights * shape.itemsize or unit.dense_nbytes
        activity, assumed = _activity(unit, counts)
        out.append(
            UnitCost(
                name=unit.name,
                packed_bytes=unit.nbytes,
                dense_bytes=dense_bytes,
                weights=weights,
                expand_s=expand,
                linear_s=linear,
                product_s=product,
                use=1.0 if unit.scheduled else shape.expert_use,
                scheduled=unit.scheduled,
                row_cost=further / product if further else PRODUCT_ROW_COST,
                neuron_bytes=neuron_bytes,
                device_rates=_device_rates(unit, on_device),
                activity=activity,
                assumed=assumed,
                decoded=_decoded(unit, machine),
                multiplies=all(_multiplies(unit.layout.tensors[n].spec) for n in unit.tensors),
            )
        )
    return tuple(out)
