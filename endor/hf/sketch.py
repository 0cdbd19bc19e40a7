"""What a model would be when packed, from its config.json alone: to plan before buying."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Unpack

from torch import nn

from endor.checkpoint.select import is_linear
from endor.checkpoint.sources.contract import SourceTensor
from endor.codecs import DTYPES
from endor.errors import ConfigError
from endor.hf.config import Loading, settled, spelled_out, workload
from endor.models.empty import empty_model, model_class
from endor.planning import available_bytes
from endor.planning import machine as hardware
from endor.planning.catalogue import Described
from endor.planning.constants import Disk, Machine
from endor.planning.plan import Plan
from endor.planning.search import MOST_SEQUENCES, Goal, search
from endor.planning.shape import ModelShape
from endor.planning.sketch import Matrix, Method, sketch_costs
from endor.trust import read_model_config

EXPERT_GROUPS = 16
"""Units that a layer's experts are planned as, at most."""

ITEMSIZE = 2
"""Bytes of a weight of the models that are sketched: bf16 or float16."""


@dataclass(frozen=True, slots=True)
class SketchedUnit:
    """A unit that does not exist yet.

    Attributes:
        name: Its matrix.
        nbytes: Its bytes when packed.
        dense_nbytes: When expanded.
    """

    name: str
    nbytes: int
    dense_nbytes: int

    @property
    def decoded_nbytes(self) -> int:
        """The same: a sketch does not plan with entropy codes undone."""
        return self.nbytes


@dataclass(frozen=True, slots=True)
class Sketch:
    """A model as its config describes it.

    Attributes:
        name: The model class.
        matrices: What packing would pack.
        shape: Everything else.
        parameters: Number of all parameters.
    """

    name: str
    matrices: tuple[Matrix, ...]
    shape: ModelShape
    parameters: int


@dataclass(frozen=True, slots=True)
class PlannedSketch:
    """A plan for a model that is not packed yet, and all that it was made from."""

    sketch: Sketch
    method: Method
    units: tuple[SketchedUnit, ...]
    machine: Machine
    disk: Disk
    plan: Plan


def sketch(path: Path | str, *, trust_remote_code: bool = False) -> Sketch:
    """Return the sketch of a model from its config.json, or the directory that has one.

    Raises:
        ConfigError: There is no such file, or transformers makes no model of it.
    """
    path = Path(path)
    folder = path.parent if path.is_file() else path
    if path.is_file() and path.name != "config.json":
        raise ConfigError(f"{path}: a model is described by its config.json, or its directory")
    config = read_model_config(folder, trust_remote_code=trust_remote_code)
    maker = model_class(config, trust_remote_code=trust_remote_code)
    model = empty_model(maker, config, folder, trust_remote_code=trust_remote_code)
    return sketch_model(model)


def sketch_model(model: nn.Module) -> Sketch:
    """Return the sketch of a model on the meta device."""
    matrices = tuple(_matrices(model))
    packed = sum(matrix.numel for matrix in matrices)
    total = sum(parameter.numel() for parameter in model.parameters())
    config: Any = model.config
    shape = ModelShape.from_config(
        config.to_dict(),
        other_bytes=(total - packed) * ITEMSIZE,
        head_packed=False,
        itemsize=ITEMSIZE,
        scratch_bytes=max((matrix.numel for matrix in matrices if not matrix.routed), default=0)
        * ITEMSIZE,
    )
    return Sketch(type(model).__name__, matrices, shape, total)


@spelled_out
def plan_sketch(
    found: Sketch,
    how: Method,
    *,
    target: Described | None = None,
    goal: Goal = "latency",
    most_sequences: int = MOST_SEQUENCES,
    **options: Unpack[Loading],
) -> PlannedSketch:
    """Return the plan for a model that is packed by `how`, here or on another machine.

    Args:
        found: The model.
        how: Sizes and kind of its packed weights.
        target: A machine that is not at hand; this one, measured, when omitted.
        goal: What is to be best; for throughput the batch is searched for.
        most_sequences: The largest batch then.
        options: As for `load_model`; without `ram` and `vram`, what the target has.

    Raises:
        BudgetError: A budget is too small; the message has the least that works.
        ConfigError: Options that make no sense.
    """
    given, purpose = settled(options), workload(options)
    ram, vram = given["ram"], given["vram"]
    if target is None:
        machine, disk = hardware.machine("BF16"), hardware.disk(Path.cwd())
        ram = available_bytes() if ram is None else ram
    else:
        machine, disk = target.machine(), target.disk
        ram = target.ram_bytes if ram is None else ram
        vram = target.vram_bytes if vram is None else vram
    costs = sketch_costs(
        found.matrices, how, machine, expert_use=found.shape.expert_use, itemsize=ITEMSIZE
    )
    chosen = search(
        costs,
        found.shape,
        machine,
        disk,
        ram_bytes=int(ram),
        vram_bytes=int(vram or 0),
        workload=purpose,
        goal=goal,
        most_sequences=most_sequences,
    )
    units = tuple(SketchedUnit(each.name, each.packed_bytes, each.dense_bytes) for each in costs)
    return PlannedSketch(found, how, units, machine, disk, chosen)


def _matrices(model: nn.Module) -> Iterator[Matrix]:
    """Yield what the default policy packs, an expert at a time, in the order of the modules."""
    made: Any = model
    head = made.get_output_embeddings() if hasattr(made, "get_output_embeddings") else None
    for module_name, module in model.named_modules():
        if module is head:
            continue
        for leaf, parameter in module.named_parameters(recurse=False):
            name, dims = f"{module_name}.{leaf}", tuple(parameter.shape)
            stack = len(dims) == 3 and "experts" in module_name.split(".")
            seen = SourceTensor(name, DTYPES["BF16"], dims, "")
            if not stack and not is_linear(seen):
                continue
            if not stack:
                yield Matrix(name, parameter.numel(), routed=".experts." in f".{module_name}.")
                continue
            # Thousands of experts are planned for a few at a time: they are all alike.
            step = max(1, dims[0] // EXPERT_GROUPS)
            for first in range(0, dims[0], step):
                count = min(step, dims[0] - first)
                yield Matrix(f"{name}.{first}", count * dims[1] * dims[2], routed=True)
