"""The weights of one model, over one or more movers."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, Self

import torch

from endor import openmp
from endor.checkpoint.neuron_counts import active_shares, counted
from endor.offload.beside_weight import BesideWeight
from endor.offload.device import Device
from endor.offload.device_mover import DeviceMover
from endor.offload.device_weight import DeviceScratch, DeviceWeight
from endor.offload.host_mover import HostMover
from endor.offload.host_weight import HostWeight, Scratch
from endor.offload.ledger import Ledger
from endor.offload.mover import Mover
from endor.offload.neuron_beside import NeuronBesideWeight
from endor.offload.neuron_reads import NeuronReads
from endor.offload.neuron_weight import NeuronWeight, is_by_neuron
from endor.offload.weight import KeptWeight, Matrix, Owner, Weight, refuse_pickle
from endor.planning.products import Products
from endor.planning.scratch import scratch_bytes
from endor.planning.tiers import Placement
from endor.planning.unit_cost import SMALL_WEIGHTS
from endor.planning.units import Unit, WeightSpec, stored_dtype
from endor.planning.workload import Experts
from endor.storage import FileLayout, RecordReader


@dataclass(frozen=True, slots=True)
class Share:
    """What one mover brings.

    Attributes:
        mover: It.
        units: What it moves.
        placement: Tier per unit.
        weights: What its units are parts of, by name.
        scratch_nbytes: Dense memory that a thread expands them into.
        reader: Reads records; closed with the mover.
        reads: Reads parts of matrices that are stored by neuron; None on a device.
    """

    mover: Mover[Any]
    units: tuple[Unit, ...]
    placement: Placement
    weights: Mapping[str, Weight]
    scratch_nbytes: int
    reader: RecordReader
    reads: NeuronReads | None = None

    @property
    def held_nbytes(self) -> int:
        """Bytes that the weights take: packed, expanded for good, slots and staging."""
        tiers = self.placement.tiers
        kept = sum(
            unit.dense_nbytes for unit in self.units if tiers[unit.name] in ("dense", "vram-dense")
        )
        parts = self.reads.nbytes if self.reads else 0
        return self.mover.held_nbytes + kept + parts + self.hot_nbytes

    @property
    def hot_nbytes(self) -> int:
        """Device memory that busy neurons of matrices on the host take."""
        weights = self.weights.values()
        return sum(each.hot_nbytes for each in weights if isinstance(each, NeuronBesideWeight))

    def report(self) -> dict[str, Any]:
        """Return where the units live, and what the mover says of itself; plain data."""
        return {
            "tiers": count_tiers(self.placement, self.units),
            "staging_bytes": self.mover.staging_bytes,
            "scratch_bytes": self.scratch_nbytes,
            "busy_neurons_bytes": self.hot_nbytes,
            "reader": self.reader.describe(),
            **self.mover.report(),
        }


def open_share(
    layouts: Sequence[FileLayout],
    units: Sequence[Unit],
    specs: Iterable[tuple[WeightSpec, torch.dtype]],
    placement: Placement,
    reader: RecordReader,
    *,
    device: Device | None = None,
    verify: bool = True,
    threads: int = 2,
    products: Products | None = None,
    ledger: Ledger | None = None,
) -> Share:
    """Return the weights `specs`, moved by a mover of their own.

    Args:
        layouts: The checkpoint's files.
        units: What moves; from `collect_units`.
        specs: What is multiplied by, and in which torch dtype.
        placement: Tier per unit.
        reader: Reads records; the mover closes it.
        device: Where it computes; the processor when omitted.
        verify: Check each record whenever it is read into host memory.
        threads: Disk reads in flight.
        products: How weights are multiplied by layers that need not be exact.
        ledger: Where to count; one of its own when omitted.

    Raises:
        DTypeError: Stored elements are integers, which no linear layer multiplies by.
        ConfigError, BudgetError: The placement does not fit the units.
    """
    specs = list(specs)
    nbytes = scratch_bytes(layouts, specs)
    mover: HostMover | DeviceMover
    reads: NeuronReads | None = None
    counts = counted(layouts) if placement.kept_bytes else None
    if device is None:
        if _takes_turns(units, placement):
            openmp.settle()
        scratch = Scratch(nbytes)
        mover = HostMover(units, placement, reader, verify=verify, threads=threads, ledger=ledger)
        reads = NeuronReads.of(units, placement, reader, mover.ledger, verify=verify, counts=counts)
    else:
        device_scratch = DeviceScratch(device, nbytes)
        nbytes = device_scratch.nbytes
        mover = DeviceMover(
            device, units, placement, reader, verify=verify, threads=threads, ledger=ledger
        )
    owner, products = Owner(mover), products or Products()
    state_of = {tensor: mover.states[unit.name] for unit in units for tensor in unit.tensors}
    weights = {}
    for key, (spec, dtype) in enumerate(specs):
        states = [state_of[part.tensor] for part in spec.parts]
        matrix = Matrix(spec, states, stored_dtype(layouts, spec), dtype, products, owner)
        weight: Weight
        if isinstance(mover, DeviceMover):
            beside = any(mover.placement.tiers[state.unit.name] == "host" for state in states)
            kept = placement.kept_bytes.get(states[0].unit.name, 0)
            if beside and kept and is_by_neuron(spec, states):
                share = active_shares(counts, spec.parts[0].tensor, spec.shape[1])
                weight = NeuronBesideWeight(
                    mover, matrix, scratch=device_scratch, kept_bytes=kept, active_share=share
                )
            else:
                kind = BesideWeight if beside else DeviceWeight
                weight = kind(mover, matrix, scratch=device_scratch)
        elif reads is not None and is_by_neuron(spec, states):
            weight = NeuronWeight(mover, matrix, scratch=scratch, key=key, reads=reads)
        else:
            weight = HostWeight(mover, matrix, scratch=scratch, key=key)
        if {placement.tiers[state.unit.name] for state in states} in ({"dense"}, {"vram-dense"}):
            weight = KeptWeight(weight)
        weights[spec.name] = weight
    return Share(mover, tuple(units), placement, weights, nbytes, reader, reads)


def _takes_turns(units: Sequence[Unit], placement: Placement) -> bool:
    """Whether several threads of Endor's work between torch's products; small matrices have one."""
    return any(
        unit.layout.tensors[name].spec.numel > SMALL_WEIGHTS
        for unit in units
        for name in unit.tensors
        if placement.tiers[unit.name] != "dense"
    )


class Store:
    """Owns the movers of one model and hands out its weights.

    Copying a model shares the store: the weights never change. Pickling is refused. When the last
    model that uses it is gone, reading stops and the memory is released.

    Several shares are for several devices. They share a ledger, and nothing else: each has its own
    staging, slots, copy stream and reader, so that every link is kept busy by itself.

    Args:
        layouts: The checkpoint's files.
        shares: From `open_share`; with one ledger.
        unpacked: Packed tensors that no layer can use packed: expanded when the model was loaded.
        products: How weights are multiplied by layers that need not be exact.

    Attributes:
        units: What moves.
        weights: What is multiplied by, by name.
        placement: Tier per unit, and the memory that units pass through.
        experts: Whether experts are `exact`, or `lossy`: replaced by others that are at hand.
        predicted: Matrices of which only rows that a predictor names are multiplied: lossy.
    """

    def __init__(
        self,
        layouts: Sequence[FileLayout],
        shares: Sequence[Share],
        *,
        unpacked: Sequence[str] = (),
        products: Products | None = None,
    ) -> None:
        self.layouts = tuple(layouts)
        self.shares = tuple(shares)
        self.unpacked = tuple(unpacked)
        self.products = products or Products()
        self.units = tuple(unit for share in shares for unit in share.units)
        self.weights = {name: weight for share in shares for name, weight in share.weights.items()}
        self.experts: Experts = "exact"
        self.predicted = 0
        placements = [share.placement for share in shares]
        self.placement = Placement(
            {name: tier for each in placements for name, tier in each.tiers.items()},
            sum(each.staging_bytes for each in placements),
            sum(each.slots for each in placements),
            kept_bytes={name: n for each in placements for name, n in each.kept_bytes.items()},
        )

    @classmethod
    def open(
        cls,
        layouts: Sequence[FileLayout],
        units: Sequence[Unit],
        specs: Iterable[tuple[WeightSpec, torch.dtype]],
        placement: Placement,
        reader: RecordReader,
        *,
        device: Device | None = None,
        verify: bool = True,
        threads: int = 2,
        unpacked: Sequence[str] = (),
        products: Products | None = None,
        ledger: Ledger | None = None,
    ) -> Self:
        """Return a store of one share; arguments and errors as for it and `open_share`."""
        share = open_share(
            layouts,
            units,
            specs,
            placement,
            reader,
            device=device,
            verify=verify,
            threads=threads,
            products=products,
            ledger=ledger,
        )
        return cls(layouts, [share], unpacked=unpacked, products=products)

    @property
    def movers(self) -> tuple[Mover[Any], ...]:
        """What brings the units: one, or one per device."""
        return tuple(share.mover for share in self.shares)

    @property
    def ledger(self) -> Ledger:
        return self.shares[0].mover.ledger

    @property
    def packed_nbytes(self) -> int:
        """Bytes of all packed records."""
        return sum(unit.nbytes for unit in self.units)

    @property
    def held_nbytes(self) -> int:
        """Bytes of memory that the weights take: packed, expanded for good, slots and staging."""
        return sum(share.held_nbytes for share in self.shares)

    @property
    def scratch_nbytes(self) -> int:
        """Bytes of dense memory that a thread expands weights into."""
        return sum(share.scratch_nbytes for share in self.shares)

    @property
    def staging_bytes(self) -> int:
        """Host memory that units pass through."""
        return sum(share.mover.staging_bytes for share in self.shares)

    @property
    def numel(self) -> int:
        """Elements of all weights."""
        return sum(weight.numel for weight in self.weights.values())

    def preload(self) -> None:
        """Wait until every resident unit is in memory, and expand what is kept expanded.

        Errors as for `Mover.take`.
        """
        for share in self.shares:
            share.mover.preload()
            kept = [weight for weight in share.weights.values() if isinstance(weight, KeptWeight)]
            for weight in kept:
                weight.dense()
            share.mover.forget(state for weight in kept for state in weight.states)
            for each in share.weights.values():
                if isinstance(each, NeuronBesideWeight):
                    each.preload()

    def close(self) -> None:
        """Stop reading and release the memory; using a weight afterwards is a BackendError."""
        for share in self.shares:
            share.mover.close()
            for weight in share.weights.values():
                weight.close()

    def count_tiers(self) -> dict[str, dict[str, int]]:
        """Return `units` and packed `nbytes` of every tier that holds any."""
        return count_tiers(self.placement, self.units)

    def report(self) -> dict[str, Any]:
        """Return where the units live, what the reader is, and the counters; all plain data.

        One share's own report is part of it; of several there is a list `devices`.
        """
        out = {
            "tiers": self.count_tiers(),
            "staging_bytes": self.staging_bytes,
            "scratch_bytes": self.scratch_nbytes,
            "unpacked_at_load": list(self.unpacked),
            "experts": self.experts,
            "predicted": self.predicted,
            "counters": self.ledger.since(type(self.ledger.counters)()),
        }
        reports = [share.report() for share in self.shares]
        if len(reports) == 1:
            return out | reports[0]
        return out | {"reader": reports[0]["reader"], "devices": reports}

    def __deepcopy__(self, memo: dict[int, Any]) -> "Store":
        return self

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        refuse_pickle()


def count_tiers(placement: Placement, units: Sequence[Unit]) -> dict[str, dict[str, int]]:
    """Return `units` and packed `nbytes` of every tier that holds any."""
    tiers: dict[str, dict[str, int]] = {}
    for unit in units:
        entry = tiers.setdefault(placement.tiers[unit.name], {"units": 0, "nbytes": 0})
        entry["units"] += 1
        entry["nbytes"] += unit.nbytes
    return tiers
