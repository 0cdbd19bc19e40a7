"""What a packed checkpoint would be as a model, found without loading a weight."""

from dataclasses import dataclass
from pathlib import Path

from endor.errors import ConfigError
from endor.hf.loading import open_layouts
from endor.hf.model import is_packed
from endor.hf.names import assign
from endor.offload import hardware
from endor.offload.costs import ModelShape
from endor.offload.hardware import Disk, Machine
from endor.offload.planner import Plan, Workload, plan
from endor.offload.units import Unit, collect_units


@dataclass(frozen=True, slots=True)
class Outline:
    """The parts of a model that planning needs.

    Attributes:
        path: The packed checkpoint.
        name: The model class.
        units: What moves, in execution order.
        shape: Everything else.
        dtype: Safetensors code of the element type that most packed weights have.
    """

    path: Path
    name: str
    units: tuple[Unit, ...]
    shape: ModelShape
    dtype: str


@dataclass(frozen=True, slots=True)
class Planned:
    """A plan, and all that it was made from."""

    outline: Outline
    machine: Machine
    disk: Disk
    plan: Plan


def plan_checkpoint(
    packed_dir: Path | str,
    *,
    ram_bytes: int,
    vram_bytes: int = 0,
    workload: Workload | None = None,
    remeasure: bool = False,
) -> Planned:
    """Return the plan for a packed checkpoint on this machine, measuring what is not remembered.

    Pass `plan.placement` to `endor.load_model` to have it come true.

    Args:
        packed_dir: The checkpoint.
        ram_bytes: Host memory for weights, cache, scratch and activations.
        vram_bytes: Device memory; 0 plans for the processor.
        workload: What the model is for.
        remeasure: Measure the machine and the disk again.

    Raises:
        BudgetError: A budget is too small; the message has the least that works.
        ConfigError: No packed checkpoint, or options that make no sense.
        FormatError: A header is damaged.
    """
    found = outline(packed_dir)
    machine = hardware.machine(found.dtype, refresh=remeasure)
    disk = hardware.disk(packed_dir, refresh=remeasure)
    chosen = plan(
        found.units,
        found.shape,
        machine,
        disk,
        ram_bytes=ram_bytes,
        vram_bytes=vram_bytes,
        workload=workload,
    )
    return Planned(found, machine, disk, chosen)


def outline(packed_dir: Path | str) -> Outline:
    """Return the outline of a packed checkpoint, from its headers and an empty model.

    Raises:
        ConfigError: The directory holds no packed checkpoint, or no model that generates text.
        FormatError: A header is damaged.
        CheckpointError: Files and model do not belong together.
    """
    import torch
    import transformers

    from endor.hf.load import _model_class

    path = Path(packed_dir)
    if not is_packed(path):
        raise ConfigError(
            f"{path}: config.json names no packed checkpoint; make one with `endor pack`"
        )
    config = transformers.AutoConfig.from_pretrained(path)
    description = config.to_dict()
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        model = _model_class(transformers, config)._from_config(config)
    layouts = open_layouts(sorted(path.glob("endor-*.safetensors")))
    assignment = assign(model, layouts, None)
    units = collect_units(layouts, assignment.weights)
    items = {unit.layout.tensors[name].spec.dtype: 0 for unit in units for name in unit.tensors}
    for unit in units:
        for name in unit.tensors:
            spec = unit.layout.tensors[name].spec
            items[spec.dtype] += spec.numel
    most = max(items, key=lambda item: items[item]) if items else None
    itemsize = most.itemsize if most else 2
    other = sum(
        parameter.numel() * itemsize
        for name, parameter in model.named_parameters()
        if name not in assignment.claimed
    )
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    packed = {id(model.get_submodule(name)) for name in assignment.linears}
    return Outline(
        path=path,
        name=type(model).__name__,
        units=units,
        shape=ModelShape.from_config(
            description,
            other_bytes=other,
            head_packed=head is None or id(head) in packed,
            itemsize=itemsize,
        ),
        dtype=most.name if most else "BF16",
    )
