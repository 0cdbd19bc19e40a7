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
from torch.nn.modules.conv import _ConvNd

from endor.codecs import TensorSpec
from endor.dependencies import internals
from endor.errors import CheckpointError, ShapeError
from endor.planning.units import Part, WeightSpec
from endor.storage import FileLayout


@dataclass(slots=True)
class Assignment:
    """What happens to the stored tensors of a checkpoint.

    Attributes:
        linears: Weight per name of a linear module.
        modules: Weight per name of a module that multiplies by it in a way of its own.
        experts: Weights of each expert, per parameter name, per name of an experts module.
        transposed: Parameters of experts whose stored matrices are the transposed ones.
        dense: Packed tensors that are used in another way: expanded when the model is loaded.
        claimed: Parameter names that the model no longer has.
    """

    linears: dict[str, WeightSpec] = field(default_factory=dict)
    modules: dict[str, WeightSpec] = field(default_factory=dict)
    experts: dict[str, dict[str, list[WeightSpec]]] = field(default_factory=dict)
    transposed: set[str] = field(default_factory=set)
    dense: list[str] = field(default_factory=list)
    claimed: set[str] = field(default_factory=set)

    @property
    def weights(self) -> list[WeightSpec]:
        """All weights, each once though several modules share it; linears first."""
        experts = [
            weight
            for stacks in self.experts.values()
            for stack in stacks.values()
            for weight in stack
        ]
        found = [*self.linears.values(), *self.modules.values(), *experts]
        return list({weight.name: weight for weight in found}.values())

    def claim(self, model: nn.Module, target: str, weight: WeightSpec) -> None:
        """Note that the module of parameter `target` multiplies by `weight`."""
        module_name = target.rpartition(".")[0]
        plain = is_linear(model.get_submodule(module_name))
        (self.linears if plain else self.modules)[module_name] = weight
        self.claimed.add(target)


@dataclass(slots=True)
class _Source:
    """The stored tensors behind one parameter or several: per source pattern, in natural order.

    Attributes:
        operations: What is done to them, in this order.
        patterns: Of the stored names.
        targets: The parameters that are made of them.
        tensors: Stored names per pattern.
    """

    operations: list[Any]
    patterns: list[str]
    targets: list[str]
    tensors: dict[str, list[str]] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        return [name for pattern in self.patterns for name in self.tensors.get(pattern, [])]

    @property
    def kinds(self) -> list[tuple[str, Any]]:
        """Each operation's name, and the dimensions that it works on."""
        return [
            (
                type(item).__name__,
                {item.dim0, item.dim1} if hasattr(item, "dim0") else getattr(item, "dim", None),
            )
            for item in self.operations
        ]


def assign(model: nn.Module, layouts: Sequence[FileLayout], quantizer: Any = None) -> Assignment:
    """Return where each packed tensor of `layouts` goes in `model`, which is on the meta device.

    Ranges of rows, concatenations, stacks of experts and their transposes stay packed. What
    reaches its parameter in another way is expanded when the model is loaded.

    Raises:
        ShapeError: Stored and expected shapes differ.
        CheckpointError: Some of an experts module's tensors are missing, or what is packed goes
            nowhere while the model lacks something.
    """
    specs = {name: entry.spec for layout in layouts for name, entry in layout.tensors.items()}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    out, extra = Assignment(), []
    sources = _sources(model, specs, quantizer)
    for target, source in sources.items():
        packed = [name for name in source.names if specs[name].codec != "dense"]
        if not packed:
            continue
        if any(name not in parameters for name in source.targets):
            extra.append(packed[0])
            continue
        parameter = parameters[target]
        module_name, _, leaf = target.rpartition(".")
        module = model.get_submodule(module_name)
        if parameter.dim() == 3 and len(source.targets) == 1 and is_own(module):
            stack = _expert_weights(target, parameter.shape, source, specs)
            if stack is not None:
                out.experts.setdefault(module_name, {})[leaf] = stack
                out.claimed.add(target)
                if _turns(source, parameter, specs):
                    out.transposed.add(target)
                continue
        elif parameter.dim() == 2 and all(_multiplies(model, name) for name in source.targets):
            matrices = _matrices(source, parameters, specs)
            for name, weight in matrices.items():
                out.claim(model, name, weight)
            if matrices:
                continue
        out.dense += packed
    _share(model, parameters, out)
    missing = _missing(model, parameters, sources)
    if extra and missing:
        raise CheckpointError(
            f"{extra[0]}: packed, but {type(model).__name__} takes it nowhere, while its "
            f"{missing[0]} is not in the checkpoint; load it with the class it was made for"
        )
    return out


def _share(model: nn.Module, parameters: Mapping[str, Any], out: Assignment) -> None:
    """Give the weights of claimed parameters to the modules whose parameters are tied to them."""
    tied: Mapping[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    for target, source in tied.items():
        if source not in out.claimed or target in out.claimed or target not in parameters:
            continue
        (name, _, leaf), (home, _, stored) = target.rpartition("."), source.rpartition(".")
        if home in out.experts:
            out.experts.setdefault(name, {})[leaf] = out.experts[home][stored]
            out.transposed |= {target} if source in out.transposed else set()
            out.claimed.add(target)
        elif _multiplies(model, target):
            out.claim(model, target, (out.linears | out.modules)[home])


def _missing(
    model: nn.Module, parameters: Mapping[str, Any], sources: Mapping[str, Any]
) -> list[str]:
    """Return parameters of the base model that nothing stored fills; new heads are no fault."""
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    prefix = f"{model.base_model_prefix}."
    body = [name for name in parameters if name.startswith(prefix)] or list(parameters)
    made = [name for source in sources.values() for name in source.targets]
    known = {*made, *tied, *tied.values()}
    return [name for name in body if name not in known]


def is_linear(module: nn.Module) -> bool:
    """Whether a module is `nn.Linear` in all that it does."""
    return isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward


def is_own(module: nn.Module) -> bool:
    """Whether a module is of a model's own class, or a linear layer of some kind.

    Convolutions and embeddings use their weights otherwise than to multiply by them, and torch's
    other modules reach around their attributes.
    """
    if isinstance(module, nn.Linear):
        return True
    others = (nn.Embedding, nn.EmbeddingBag, nn.Bilinear, nn.MultiheadAttention, _ConvNd)
    return not isinstance(module, others) and not type(module).__module__.startswith("torch.")


def _multiplies(model: nn.Module, target: str) -> bool:
    module_name, _, leaf = target.rpartition(".")
    return leaf == "weight" and is_own(model.get_submodule(module_name))


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
            out[target] = _Source([], [name], [target], {name: [name]})
            continue
        converter = by_pattern[pattern]
        first = converter.target_patterns[0]
        targets = [target.replace(first, each, 1) for each in converter.target_patterns]
        source = out.setdefault(
            target,
            _Source(list(converter.operations), list(converter.source_patterns), targets),
        )
        source.tensors.setdefault(pattern, []).append(name)
    return out


def _matrices(
    source: _Source, parameters: Mapping[str, Any], specs: Mapping[str, TensorSpec]
) -> dict[str, WeightSpec]:
    """Return matrices by parameter: stored ones below each other, or rows of one; else nothing."""
    target, names = source.targets[0], source.names
    if source.kinds in ([], [("Concatenate", 0)]) and len(source.targets) == 1:
        shape = parameters[target].shape
        parts = _stack_rows(target, shape, names, specs)
        return {target: WeightSpec(target, tuple(shape), parts, target)}
    if source.kinds not in ([("Chunk", 0)], [("Split", 0)]) or len(names) != 1:
        return {}
    spec, out, at = specs[names[0]], {}, 0
    for name in source.targets:
        shape = parameters[name].shape
        if len(spec.shape) != len(shape) or spec.shape[1:] != tuple(shape[1:]):
            raise _wrong_shape(names[0], spec.shape, name, shape)
        parts = (Part(names[0], at, at + shape.numel(), 0),)
        out[name] = WeightSpec(name, tuple(shape), parts, name)
        at += shape.numel()
    if at != spec.numel:
        rows = at // max(1, spec.shape[-1])
        raise _wrong_shape(names[0], spec.shape, ", ".join(source.targets), (rows, *spec.shape[1:]))
    return out


def _turns(source: _Source, parameter: Any, specs: Mapping[str, TensorSpec]) -> bool:
    """Whether a stack of experts is stored with its matrices transposed."""
    if source.kinds != [("Transpose", {1, 2})]:
        return False
    checked = getattr(source.operations[0], "check_dims", False)
    return not (checked and specs[source.names[0]].shape == tuple(parameter.shape))


def _expert_weights(
    target: str, shape: torch.Size, source: _Source, specs: Mapping[str, TensorSpec]
) -> list[WeightSpec] | None:
    """Return the weights of the experts of a fused parameter `(experts, rows, cols)`, as stored.

    None when they come about in a way that packed weights cannot follow.
    """
    experts, rows, cols = shape
    kinds = source.kinds
    if kinds in ([], [("Transpose", {1, 2})]):
        name = source.names[0]
        if _turns(source, torch.empty(shape, device="meta"), specs):
            rows, cols = cols, rows
        if specs[name].shape != (experts, rows, cols):
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
    if kinds not in ([("MergeModulelist", 0)], [("MergeModulelist", 0), ("Concatenate", 1)]):
        return None
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
