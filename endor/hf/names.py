"""From the tensors of a packed checkpoint to the weights of a transformers model.

A packed file keeps the names of the checkpoint it was made from. transformers renames those, and
for fused experts merges many tensors into one parameter; here the same rules tell which flat range
of which stored tensor lands where.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from endor.codecs import TensorSpec
from endor.dependencies import internals
from endor.errors import CheckpointError, ShapeError
from endor.offload.units import Part, WeightSpec
from endor.storage import FileLayout


@dataclass(slots=True)
class Assignment:
    """What happens to the stored tensors of a checkpoint.

    Attributes:
        linears: Weight per name of a linear module.
        experts: Weights of each expert, per parameter name, per name of an experts module.
        dense: Packed tensors that other modules use: expanded when the model is loaded.
        claimed: Parameter names that the model no longer has.
    """

    linears: dict[str, WeightSpec] = field(default_factory=dict)
    experts: dict[str, dict[str, list[WeightSpec]]] = field(default_factory=dict)
    dense: list[str] = field(default_factory=list)
    claimed: set[str] = field(default_factory=set)

    @property
    def weights(self) -> list[WeightSpec]:
        """All weights, linears first."""
        experts = [
            weight
            for stacks in self.experts.values()
            for stack in stacks.values()
            for weight in stack
        ]
        return [*{spec.name: spec for spec in self.linears.values()}.values(), *experts]


@dataclass(slots=True)
class _Source:
    """The stored tensors behind one parameter: per source pattern, in natural order of names."""

    operations: list[Any]
    patterns: list[str]
    tensors: dict[str, list[str]] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        return [name for pattern in self.patterns for name in self.tensors.get(pattern, [])]


def assign(model: nn.Module, layouts: Sequence[FileLayout], quantizer: Any = None) -> Assignment:
    """Return where each packed tensor of `layouts` goes in `model`, which is on the meta device.

    A tensor that reaches its parameter by an operation other than renaming, merging experts and
    concatenation is expanded.

    Raises:
        ShapeError: Stored and expected shapes differ.
        CheckpointError: Some of an experts module's tensors are missing.
    """
    specs = {name: entry.spec for layout in layouts for name, entry in layout.tensors.items()}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    out, extra = Assignment(), []
    experts: dict[str, dict[str, _Source]] = {}
    sources = _sources(model, specs, quantizer)
    for target, source in sources.items():
        packed = [name for name in source.names if specs[name].codec != "dense"]
        if not packed:
            continue
        module_name, _, leaf = target.rpartition(".")
        parameter = parameters.get(target)
        if parameter is None:
            extra.append(packed[0])
            continue
        module = model.get_submodule(module_name)
        if parameter.dim() == 3 and _is_experts(module):
            experts.setdefault(module_name, {})[leaf] = source
        elif leaf == "weight" and is_linear(module) and _kinds(source) in _MATRICES:
            out.linears[module_name] = _matrix(target, parameter.shape, source, specs)
            out.claimed.add(target)
        else:  # expanded in memory, where transformers does with it what it does with any
            out.dense += packed
    for module_name, leaves in experts.items():
        if any(_kinds(source) not in _STACKS for source in leaves.values()):
            out.dense += [
                name
                for source in leaves.values()
                for name in source.names
                if specs[name].codec != "dense"
            ]
            continue
        for leaf, source in leaves.items():
            target = f"{module_name}.{leaf}"
            shape = parameters[target].shape
            stacks = out.experts.setdefault(module_name, {})
            stacks[leaf] = _expert_weights(target, shape, source, specs)
            out.claimed.add(target)
    _share_tied(model, out)
    missing = _missing(model, parameters, sources)
    if extra and missing:
        raise CheckpointError(
            f"{extra[0]}: packed, but {type(model).__name__} takes it nowhere, while its "
            f"{missing[0]} is not in the checkpoint; load it with the class it was made for"
        )
    return out


def _missing(
    model: nn.Module, parameters: Mapping[str, Any], sources: Mapping[str, Any]
) -> list[str]:
    """Return parameters of the base model that nothing stored fills; new heads are no fault."""
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    prefix = f"{model.base_model_prefix}."
    body = [name for name in parameters if name.startswith(prefix)] or list(parameters)
    known = {*sources, *tied, *tied.values()}
    return [name for name in body if name not in known]


def is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward


def _is_experts(module: nn.Module) -> bool:
    return hasattr(module, "num_experts") and hasattr(module, "is_transposed")


def _sources(
    model: nn.Module, specs: Mapping[str, TensorSpec], quantizer: Any
) -> dict[str, _Source]:
    """Return the stored tensors of every parameter, by transformers' own renaming."""
    (get_model_conversion_mapping,) = internals(
        "transformers.conversion_mapping", "get_model_conversion_mapping"
    )
    WeightConverter, WeightRenaming, dot_natural_key, rename_source_key = internals(
        "transformers.core_model_loading",
        "WeightConverter",
        "WeightRenaming",
        "dot_natural_key",
        "rename_source_key",
    )
    mapping = get_model_conversion_mapping(model, None, quantizer)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: entry for entry in converters for pattern in entry.source_patterns}
    prefix = model.base_model_prefix
    expected = model.state_dict()
    out: dict[str, _Source] = {}
    for name in sorted(specs, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, prefix, expected)
        if target not in expected and name in expected:
            target, pattern = rename_source_key(name, [], [], prefix, expected)
        if pattern is None:
            out[target] = _Source([], [name], {name: [name]})
            continue
        converter = by_pattern[pattern]
        source = out.setdefault(
            target, _Source(list(converter.operations), list(converter.source_patterns))
        )
        source.tensors.setdefault(pattern, []).append(name)
    return out


_MATRICES: tuple[list[tuple[str, Any]], ...] = ([], [("Concatenate", 0)])
"""What may be done to stored tensors on their way to a linear layer's weight: parts are rows."""

_STACKS: tuple[list[tuple[str, Any]], ...] = (
    [],
    [("MergeModulelist", 0)],
    [("MergeModulelist", 0), ("Concatenate", 1)],
)
"""The same on their way to a stack of experts."""


def _kinds(source: _Source) -> list[tuple[str, Any]]:
    return [(type(item).__name__, getattr(item, "dim", None)) for item in source.operations]


def _share_tied(model: nn.Module, found: Assignment) -> None:
    """Give linear layers that are tied to a packed one, in layers that are shared, its weight."""
    for target, source in (getattr(model, "all_tied_weights_keys", None) or {}).items():
        module_name, _, leaf = target.rpartition(".")
        spec = found.linears.get(source.removesuffix(".weight"))
        if spec is None or leaf != "weight" or module_name in found.linears:
            continue
        if is_linear(model.get_submodule(module_name)):
            found.linears[module_name] = spec
            found.claimed.add(target)


def _matrix(
    target: str, shape: torch.Size, source: _Source, specs: Mapping[str, TensorSpec]
) -> WeightSpec:
    """Return a linear's weight: one stored tensor, or several on top of each other."""
    parts = _stack_rows(target, shape, source.names, specs)
    return WeightSpec(target, tuple(shape), parts, target)


def _expert_weights(
    target: str, shape: torch.Size, source: _Source, specs: Mapping[str, TensorSpec]
) -> list[WeightSpec]:
    """Return the weights of the experts of a fused parameter `(experts, rows, cols)`."""
    experts, rows, cols = shape
    if not source.operations:
        name = source.names[0]
        if specs[name].shape != tuple(shape):
            raise _wrong_shape(name, specs[name].shape, target, shape)
        size = rows * cols
        return [
            WeightSpec(
                f"{target}.{expert}",
                (rows, cols),
                (Part(name, expert * size, (expert + 1) * size, 0),),
                target,
                routed=True,
            )
            for expert in range(experts)
        ]
    columns = [source.tensors.get(pattern, []) for pattern in source.patterns]
    for pattern, names in zip(source.patterns, columns, strict=True):
        if len(names) != experts:
            raise CheckpointError(
                f"{target}: needs {experts} tensors {pattern}, got {len(names)}; the checkpoint is "
                "incomplete: convert it again"
            )
    one = torch.Size((rows, cols))
    return [
        WeightSpec(
            f"{target}.{expert}",
            (rows, cols),
            _stack_rows(f"{target}.{expert}", one, [names[expert] for names in columns], specs),
            target,
            routed=True,
        )
        for expert in range(experts)
    ]


def _stack_rows(
    target: str, shape: torch.Size, names: Sequence[str], specs: Mapping[str, TensorSpec]
) -> tuple[Part, ...]:
    """Return the parts of a matrix that is made of whole stored matrices, one below the other."""
    parts, offset = [], 0
    for name in names:
        spec = specs[name]
        if len(spec.shape) != len(shape) or spec.shape[1:] != tuple(shape[1:]):
            raise _wrong_shape(name, spec.shape, target, shape)
        parts.append(Part(name, 0, spec.numel, offset))
        offset += spec.numel
    if offset != shape.numel():
        raise _wrong_shape(
            ", ".join(names), (offset // max(1, shape[-1]), *shape[1:]), target, shape
        )
    return tuple(parts)


def _wrong_shape(
    name: str, found: Sequence[int], target: str, expected: Sequence[int]
) -> ShapeError:
    return ShapeError(
        f"{name}: stored shape {list(found)} does not fit {target} {list(expected)}; the config "
        "and the weights do not belong together"
    )
