"""Opening the packed weights of a loaded model: the planner decides, the stores obey."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch

from endor.checkpoint.neuron_counts import counted
from endor.errors import ConfigError
from endor.hf import device_map as places
from endor.hf import ranges
from endor.hf.config import workload
from endor.hf.device_map import DeviceMap, device_budget, open_reader_for
from endor.hf.generation_cache import refuse_kv
from endor.models.assignment import Assignment
from endor.models.outline import model_shape, most_common, parameter_bytes
from endor.offload.device import Device
from endor.offload.ledger import Ledger
from endor.offload.store import Share, Store, open_share
from endor.planning import machine as hardware
from endor.planning.constants import TYPICAL_LINK, Disk, Machine
from endor.planning.devices import combine
from endor.planning.fill import share_host_bytes
from endor.planning.limits import available_bytes
from endor.planning.plan import Plan, Workload, plan
from endor.planning.products import Products, choose
from endor.planning.shape import ModelShape
from endor.planning.tiers import Tier
from endor.planning.unit_cost import unit_costs
from endor.planning.units import Unit, WeightSpec, collect_units
from endor.planning.whole import whole_weights
from endor.storage import FileLayout

if TYPE_CHECKING:
    from endor.hf.quantization_config import EndorConfig

WeightType = tuple[WeightSpec, torch.dtype]


@dataclass(frozen=True, slots=True)
class Opened:
    """The weights of a model.

    Attributes:
        store: They.
        plan: Where they are and how fast that should be; None when the caller placed them.
        devices: Device per module prefix.
    """

    store: Store
    plan: Plan | None
    devices: dict[str, torch.device] = field(default_factory=dict)


@dataclass(slots=True)
class Placing:
    """Places the weights of one model and opens them.

    Attributes:
        model: The model, its unpacked parameters loaded on the processor.
        layouts: The checkpoint's files.
        assignment: Which weights are packed.
        specs: They, and the types they are expanded to.
        config: How the caller wants them.
        device_map: Where the caller wants them, and the limits.
        dtype: What the model computes in.
        named: What predictors of neurons leave of matrices; see `Workload`.
    """

    model: Any
    layouts: Sequence[FileLayout]
    assignment: Assignment
    specs: Sequence[WeightType]
    config: "EndorConfig"
    device_map: DeviceMap
    dtype: torch.dtype
    named: Mapping[str, tuple[float, int]] = field(default_factory=dict)

    def open(self) -> Opened:
        """Return the opened weights, with the unpacked parameters on their devices.

        Raises:
            BudgetError: A budget is too small.
            ConfigError: The device map or the placement does not fit the model.
            BackendError: A device cannot be used.
        """
        names = {name for name, _ in self.model.named_parameters()} | self.assignment.claimed
        self.device_map.check(names)
        self.workload.check()
        devices = self.device_map.devices()
        return self._on_devices(devices) if devices else self._on_host()

    @property
    def workload(self) -> Workload:
        wanted = replace(workload(self.config.options), named=self.named)
        if wanted.kv == "auto" and (len(self.device_map.devices()) > 1 or refuse_kv(self.model)):
            return replace(wanted, kv="device")  # nowhere else: a plan must not count on it
        return wanted

    def _on_host(self) -> Opened:
        config = self.config
        units = collect_units(self.layouts, [spec for spec, _ in self.specs])
        placement, planned, products = config.placement, None, Products()
        machine, disk = self._constants(units)
        if placement is not None and not config.exact:
            shape = self._shape(self.specs)
            products = choose(unit_costs(units, machine, shape, named=self.named), machine)
        if placement is None:
            # The parameters are loaded: what they take is no longer available, but in the budget.
            room = available_bytes() + parameter_bytes(self.model)
            planned = plan(
                units,
                self._shape(self.specs),
                machine,
                disk,
                ram_bytes=self._ram(room),
                workload=self.workload,
                wishes=self._wishes(units, self.specs),
                counts=counted(self.layouts),
            )
            named = [spec for spec, _ in self.specs]
            placement = whole_weights(planned.placement, units, named)
            products = planned.products
        reader = open_reader_for(config.reader, "cpu", self.layouts)
        try:
            store = Store.open(
                self.layouts,
                units,
                self.specs,
                placement,
                reader,
                verify=config.verify,
                threads=config.threads,
                unpacked=self.assignment.dense,
                products=products,
            )
        except BaseException:
            reader.close()
            raise
        return Opened(store, planned)

    def _on_devices(self, names: Sequence[str]) -> Opened:
        opened = {name: places.open_device(name) for name in names}
        budgets = {
            name: device_budget(device, self.config.vram, self.device_map.limits.get(name))
            for name, device in opened.items()
        }
        devices_of = self._devices_of(budgets)
        used = [name for name in names if name in devices_of.values()]
        specs = {
            name: [
                item
                for item in self.specs
                if devices_of[ranges.prefix_of(item[0].name, devices_of)] == name
            ]
            for name in used
        }
        units = {
            name: collect_units(self.layouts, [spec for spec, _ in specs[name]]) for name in used
        }
        plans = self._plans(budgets, devices_of, specs, units)
        devices = {prefix: opened[name].device for prefix, name in devices_of.items()}
        ranges.place_parameters(self.model, devices)
        ledger = Ledger()
        shares: list[Share] = []
        try:
            for name in used:
                planned = plans.get(name)
                shares.append(
                    self._open_share(opened[name], name, units[name], specs[name], planned, ledger)
                )
        except BaseException:
            for share in shares:
                share.mover.close()
            raise
        if len(used) > 1:
            ranges.move_between(self.model, devices)
        store = Store(self.layouts, shares, unpacked=self.assignment.dense)
        return Opened(store, combine(list(plans.values())) if plans else None, devices)

    def _open_share(
        self,
        device: Device,
        name: str,
        units: Sequence[Unit],
        specs: Sequence[WeightType],
        planned: Plan | None,
        ledger: Ledger,
    ) -> Share:
        placement = self.config.placement if planned is None else planned.placement
        assert placement is not None
        reader = open_reader_for(self.config.reader, name, self.layouts)
        try:
            return open_share(
                self.layouts,
                units,
                specs,
                placement,
                reader,
                device=device,
                verify=self.config.verify,
                threads=self.config.threads,
                products=planned.products if planned else None,
                ledger=ledger,
            )
        except BaseException:
            reader.close()
            raise

    def _devices_of(self, budgets: Mapping[str, int]) -> dict[str, str]:
        """Return the device that computes each module prefix; RAM and disk are used by the main."""
        device_map = self.device_map
        if device_map.mode is not None:
            return ranges.layer_ranges(self.model, self._sizes(), budgets, device_map.mode)
        devices_of = {"": device_map.main}
        for prefix, place in device_map.places.items():
            devices_of[prefix] = place if place.startswith("cuda") else device_map.main
        return devices_of

    def _sizes(self) -> dict[str, int]:
        """Return the bytes of each module: packed weights, parameters below it, and its cache."""
        sizes: dict[str, int] = {}

        def add(name: str, nbytes: int) -> None:
            while True:
                sizes[name] = sizes.get(name, 0) + nbytes
                if not name:
                    return
                name = name.rpartition(".")[0]

        stored = {name: item for layout in self.layouts for name, item in layout.tensors.items()}
        for spec, _ in self.specs:
            for part in spec.parts:
                share = (part.stop - part.start) / max(1, stored[part.tensor].spec.numel)
                add(spec.name, int(stored[part.tensor].spec.nbytes * share))
        for name, parameter in self.model.named_parameters():
            add(name, parameter.numel() * parameter.element_size())
        return sizes

    def _plans(
        self,
        budgets: Mapping[str, int],
        devices_of: Mapping[str, str],
        specs: Mapping[str, Sequence[WeightType]],
        units: Mapping[str, Sequence[Unit]],
    ) -> dict[str, Plan]:
        """Return the plan of each device; none when the caller placed the weights."""
        if self.config.placement is not None:
            if len(units) > 1:
                raise ConfigError("placement: is for one device, and the device map has several")
            return {}
        machine, disk = self._constants([unit for each in units.values() for unit in each])
        if machine.link is None:
            machine = replace(machine, link=TYPICAL_LINK)
        whole = self._shape(self.specs)
        shapes = {
            name: self._part(whole, devices_of, name, specs[name]) if len(units) > 1 else whole
            for name in units
        }
        room = self._ram(available_bytes() + parameter_bytes(self.model))
        packed = {name: sum(unit.nbytes for unit in each) for name, each in units.items()}
        shares = share_host_bytes(
            room,
            [max((unit.nbytes for unit in each), default=0) for each in units.values()],
            [max(0, packed[name] + shapes[name].other_bytes - budgets[name]) for name in units],
        )
        counts = counted(self.layouts)
        return {
            name: plan(
                units[name],
                shapes[name],
                machine,
                disk,
                ram_bytes=ram,
                vram_bytes=budgets[name],
                workload=self.workload,
                wishes=self._wishes(units[name], specs[name]),
                counts=counts,
            )
            for name, ram in zip(units, shares, strict=True)
        }

    def _part(
        self,
        whole: ModelShape,
        devices_of: Mapping[str, str],
        name: str,
        specs: Sequence[WeightType],
    ) -> ModelShape:
        """Return the shape of what one of several devices holds."""
        own = [prefix for prefix in devices_of if prefix and devices_of[prefix] == name]
        layers = [prefix for prefix in own if prefix.rpartition(".")[2].isdigit()]
        share = min(1.0, len(layers) / whole.layers) if layers else 1.0
        other = sum(
            parameter.numel() * parameter.element_size()
            for key, parameter in self.model.named_parameters()
            if devices_of[ranges.prefix_of(key, devices_of)] == name
        )
        part = model_shape(self.model, self.assignment, self.layouts, specs, other, self.dtype)
        if devices_of[ranges.prefix_of(_head_name(self.model), devices_of)] != name:
            part = replace(part, head_bytes=0, vocab=0)
        return replace(
            part,
            layers=max(1, round(whole.layers * share)),
            kv_bytes_per_token=-(-whole.kv_bytes_per_token * len(layers) // whole.layers)
            if layers
            else whole.kv_bytes_per_token,
        )

    def _shape(self, specs: Sequence[WeightType]) -> ModelShape:
        return model_shape(self.model, self.assignment, self.layouts, specs, None, self.dtype)

    def _constants(self, units: Sequence[Unit]) -> tuple[Machine, Disk]:
        """Return what is known of this machine, or measured if the caller wants that."""
        item, path = most_common(units), self.layouts[0].path
        if not self.config.measure or item not in ("BF16", "F16", "F32"):
            return hardware.remembered(item, path)
        return hardware.machine(item), hardware.disk(path.parent)

    def _ram(self, room: int) -> int:
        """Return the host memory to plan with: the caller's, or what there is."""
        ram: int | None = self.config.ram
        if ram is not None:
            return ram
        limit = self.device_map.limits.get("cpu")
        return room if limit is None else min(room, limit)

    def _wishes(self, units: Sequence[Unit], specs: Sequence[WeightType]) -> dict[str, Tier]:
        """Return the tier of each unit whose module the device map gives one."""
        unit_of = {tensor: unit.name for unit in units for tensor in unit.tensors}
        out: dict[str, Tier] = {}
        for spec, _ in specs:
            tier = self.device_map.tier_of(spec.name)
            if tier is not None:
                out |= {unit_of[part.tensor]: tier for part in spec.parts}
        return out


def _head_name(model: Any) -> str:
    """Return the name of the module that makes logits, the root's when there is none."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return next((name for name, module in model.named_modules() if module is head), "")
