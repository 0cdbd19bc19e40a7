"""What a packed checkpoint would be as a model, found without loading a weight."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

from endor.checkpoint.index import read_packed_index
from endor.codecs import DTYPES
from endor.errors import ConfigError
from endor.hf.config import Loading, settled, spelled_out, workload
from endor.hf.load import model_class
from endor.hf.loading import open_layouts
from endor.hf.model import is_packed, parameter_bytes, read_config, refuse_quantized
from endor.models.assignment import Assignment, assign
from endor.packed import torch_dtype
from endor.planning import available_bytes
from endor.planning import machine as hardware
from endor.planning.catalogue import Described
from endor.planning.machine import Disk, Machine
from endor.planning.plan import Plan, plan
from endor.planning.scratch import scratch_bytes
from endor.planning.shape import ModelShape
from endor.planning.units import Unit, WeightSpec, collect_units
from endor.storage import FileLayout
from endor.trust import one_line_errors, read_model_config

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Outline:
    """The parts of a model that planning needs.

    Attributes:
        path: The packed checkpoint.
        name: The model class.
        units: What moves, in execution order.
        shape: Everything else.
        dtype: Safetensors code of the element type that most packed weights have.
        expanded: Packed tensors that the model uses in a way that needs them dense.
        expanded_nbytes: What they take when expanded.
    """

    path: Path
    name: str
    units: tuple[Unit, ...]
    shape: ModelShape
    dtype: str
    expanded: tuple[str, ...] = ()
    expanded_nbytes: int = 0


@dataclass(frozen=True, slots=True)
class Planned:
    """A plan, and all that it was made from."""

    outline: Outline
    machine: Machine
    disk: Disk
    plan: Plan


@spelled_out
def plan_checkpoint(
    packed_dir: Path | str,
    *,
    remeasure: bool = False,
    trust_remote_code: bool = False,
    target: Described | None = None,
    **options: Unpack[Loading],
) -> Planned:
    """Return the plan for a packed checkpoint on this machine, measuring what is not remembered.

    Pass `plan.placement` to `endor.load_model` to have it come true.

    Args:
        packed_dir: The checkpoint.
        remeasure: Measure the machine and the disk again.
        trust_remote_code: As for `outline`.
        target: A machine that is not at hand, instead of this one, with all its memory where
            `ram` and `vram` do not say how much.
        options: As for `load_model`, of which planning needs memory, arithmetic and what is planned
            for; without `vram` the plan is for the processor.

    Raises:
        BudgetError: A budget is too small; the message has the least that works.
        ConfigError: No packed checkpoint, or options that make no sense.
        FormatError: A header is damaged.
    """
    given, purpose = settled(options), workload(options)
    ram, vram = given["ram"], given["vram"]
    found = outline(packed_dir, trust_remote_code=trust_remote_code)
    if target is None:
        machine = hardware.machine(found.dtype, refresh=remeasure)
        disk = hardware.disk(packed_dir, refresh=remeasure)
    else:
        machine, disk = target.machine(found.dtype), target.disk
        ram = target.ram_bytes if ram is None else ram
        vram = target.vram_bytes if vram is None else vram
    chosen = plan(
        found.units,
        found.shape,
        machine,
        disk,
        ram_bytes=available_bytes() if ram is None else int(ram),
        vram_bytes=int(vram or 0),
        workload=purpose,
    )
    return Planned(found, machine, disk, chosen)


def outline(packed_dir: Path | str, *, trust_remote_code: bool = False) -> Outline:
    """Return the outline of a packed checkpoint, from its headers and an empty model.

    Args:
        packed_dir: The checkpoint.
        trust_remote_code: Run Python code that comes with it; without, one that needs that is
            refused.

    Raises:
        ConfigError: The directory holds no packed checkpoint.
        FormatError: A header is damaged.
        CheckpointError: Files and model do not belong together.
    """
    import torch

    path = Path(packed_dir)
    if not is_packed(path):
        raise ConfigError(
            f"{path}: config.json names no packed checkpoint; make one with `endor pack`"
        )
    refuse_quantized(read_config(path)["quantization_config"])
    read_packed_index(path)
    config = read_model_config(path, trust_remote_code=trust_remote_code)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    found = model_class(config, trust_remote_code=trust_remote_code)
    options: dict[str, Any] = {}
    if not hasattr(found, "_from_config"):
        options["trust_remote_code"] = trust_remote_code
    build = getattr(found, "_from_config", None) or found.from_config
    with torch.device("meta"), one_line_errors(path, "no model can be made of its config.json"):
        model = build(config, **options)
    layouts = open_layouts(sorted(path.glob("endor-*.safetensors")))
    assignment = assign(model, layouts, None)
    units = collect_units(layouts, assignment.weights)
    item = most_common(units)
    dtype = torch_dtype(DTYPES[item])
    unpacked = sum(
        parameter.numel() * dtype.itemsize
        for name, parameter in model.named_parameters()
        if name not in assignment.claimed
    )
    specs = [(spec, dtype) for spec in assignment.weights]
    shape = model_shape(model, assignment, layouts, specs, unpacked, dtype)
    stored = {name: entry.spec for layout in layouts for name, entry in layout.tensors.items()}
    expanded = tuple(assignment.dense)
    return Outline(
        path,
        type(model).__name__,
        units,
        shape,
        item,
        expanded,
        sum(stored[name].dense_nbytes for name in expanded),
    )


def most_common(units: Iterable[Unit]) -> str:
    """Return the safetensors code of the element type that most packed weights have."""
    counts: dict[str, int] = {}
    for unit in units:
        for name in unit.tensors:
            spec = unit.layout.tensors[name].spec
            counts[spec.dtype.name] = counts.get(spec.dtype.name, 0) + spec.numel
    return max(counts, key=lambda name: counts[name], default="BF16")


def model_shape(
    model: Any,
    assignment: Assignment,
    layouts: Sequence[FileLayout],
    specs: Sequence[tuple[WeightSpec, "torch.dtype"]],
    unpacked_bytes: int | None,
    dtype: "torch.dtype",
) -> ModelShape:
    """Return what planning needs to know of a model besides its units.

    Args:
        model: The model, its packed modules replaced or not.
        assignment: Which of them are.
        layouts: The files.
        specs: The packed weights and the types they are expanded to.
        unpacked_bytes: What the other parameters take; counted when None.
        dtype: What the model computes in.
    """
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    packed = {
        id(model.get_submodule(name)) for name in {**assignment.linears, **assignment.modules}
    }
    other = parameter_bytes(model) if unpacked_bytes is None else unpacked_bytes
    scratch = scratch_bytes(layouts, specs)
    try:
        return ModelShape.from_config(
            model.config.to_dict() if hasattr(model.config, "to_dict") else {},
            other_bytes=other,
            head_packed=head is None or id(head) in packed,
            itemsize=dtype.itemsize,
            scratch_bytes=scratch,
        )
    except ConfigError:  # not a language model: without a cache of keys and values to plan for
        return ModelShape(1, 1, 1, 0, 0, other, 0, 0, 1.0, scratch, dtype.itemsize)
