"""What a packed checkpoint would be as a model, found without loading a weight."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from endor.checkpoint.index import read_packed_index
from endor.checkpoint.loadable import is_packed, open_layouts, read_config, refuse_quantized
from endor.checkpoint.neuron_counts import NeuronCounts, counted
from endor.codecs import DTYPES
from endor.dtypes import torch_dtype
from endor.errors import ConfigError
from endor.models.assignment import Assignment, assign
from endor.models.empty import empty_model, model_class
from endor.planning.scratch import scratch_bytes
from endor.planning.shape import ModelShape
from endor.planning.units import Unit, WeightSpec, collect_units
from endor.storage import FileLayout
from endor.trust import read_model_config


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
        counts: How often neurons are active, where the checkpoint says so.
    """

    path: Path
    name: str
    units: tuple[Unit, ...]
    shape: ModelShape
    dtype: str
    expanded: tuple[str, ...] = ()
    expanded_nbytes: int = 0
    counts: NeuronCounts | None = None


def outline(
    packed_dir: Path | str, *, trust_remote_code: bool = False, on_device: bool = False
) -> Outline:
    """Return the outline of a packed checkpoint, from its headers and an empty model.

    Args:
        packed_dir: The checkpoint.
        trust_remote_code: Run Python code that comes with it; without, one that needs that is
            refused.
        on_device: A device is to compute.

    Raises:
        ConfigError: The directory holds no packed checkpoint.
        FormatError: A header is damaged.
        CheckpointError: Files and model do not belong together.
    """
    path = Path(packed_dir)
    if not is_packed(path):
        raise ConfigError(
            f"{path}: config.json names no packed checkpoint; make one with `endor pack`"
        )
    refuse_quantized(read_config(path)["quantization_config"])
    read_packed_index(path)
    config = read_model_config(path, trust_remote_code=trust_remote_code)
    maker = model_class(config, trust_remote_code=trust_remote_code)
    model = empty_model(maker, config, path, trust_remote_code=trust_remote_code)
    layouts = open_layouts(sorted(path.glob("endor-*.safetensors")))
    assignment = assign(model, layouts, None, on_device=on_device)
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
        counted(layouts),
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
    specs: Sequence[tuple[WeightSpec, torch.dtype]],
    unpacked_bytes: int | None,
    dtype: torch.dtype,
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


def parameter_bytes(model: Any) -> int:
    """Return the bytes of the parameters and buffers that are not packed."""
    tensors = {id(item): item for item in (*model.parameters(), *model.buffers())}
    return sum(item.numel() * item.element_size() for item in tensors.values())
