"""Which modules of a transformers model keep their weights packed, and where those lie.

A packed file keeps the names of the checkpoint it was made from; `endor.models.mapping` says what
becomes of them. Here its rows turn into the flat ranges of stored tensors that a unit can expand.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from endor.errors import CheckpointError
from endor.models.layers import is_linear, is_own
from endor.models.mapping import Source, sources
from endor.models.pieces import Piece, Pieces
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


def assign(
    model: nn.Module,
    layouts: Sequence[FileLayout],
    quantizer: Any = None,
    *,
    on_device: bool = False,
) -> Assignment:
    """Return where each packed tensor of `layouts` goes in `model`, which is on the meta device.

    Ranges of rows, concatenations, stacks of experts and their transposes stay packed. What
    reaches its parameter in another way is expanded when the model is loaded.

    Args:
        model: Without weights.
        layouts: The files.
        quantizer: That of transformers, where it loads the model.
        on_device: A device computes, which takes no matrices in bundles: they are expanded, too.

    Raises:
        ShapeError: Stored and expected shapes differ.
        CheckpointError: Some of an experts module's tensors are missing, or what is packed goes
            nowhere while the model lacks something.
    """
    specs = {name: entry.spec for layout in layouts for name, entry in layout.tensors.items()}
    shapes = {name: spec.shape for name, spec in specs.items()}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    out, extra = Assignment(), []
    found = sources(model, specs, quantizer)
    for source in found:
        packed = [name for name in source.names if specs[name].codec != "dense"]
        if not packed:
            continue
        if any(name not in parameters for name in source.targets):
            extra.append(packed[0])
        elif (on_device and any(specs[name].bundles for name in packed)) or not _claim(
            out, model, source, parameters, shapes
        ):
            out.dense += packed
    _share(model, parameters, out)
    missing = _missing(model, parameters, found)
    if extra and missing:
        raise CheckpointError(
            f"{extra[0]}: packed, but {type(model).__name__} takes it nowhere, while its "
            f"{missing[0]} is not in the checkpoint; load it with the class it was made for"
        )
    return out


def _claim(
    out: Assignment,
    model: nn.Module,
    source: Source,
    parameters: Mapping[str, torch.Tensor],
    shapes: Mapping[str, tuple[int, ...]],
) -> bool:
    """Note the weights of all targets of a source; False if one of them cannot stay packed."""
    if not all(_stays(model, name, parameters[name]) for name in source.targets):
        return False
    made = source.pieces(model, parameters, shapes)
    if made is None or not all(_ranges(parameters[name], made[name]) for name in made):
        return False
    for name, pieces in made.items():
        module_name, _, leaf = name.rpartition(".")
        weights = _weights(name, parameters[name], pieces)
        if parameters[name].dim() == 2:
            out.claim(model, name, weights[0])
            continue
        out.experts.setdefault(module_name, {})[leaf] = weights
        out.claimed.add(name)
        if pieces[0].turned:
            out.transposed.add(name)
    return True


def _stays(model: nn.Module, name: str, parameter: torch.Tensor) -> bool:
    """Whether a module multiplies by a parameter so that it can be packed."""
    if parameter.dim() == 3:
        return is_own(model.get_submodule(name.rpartition(".")[0]))
    return parameter.dim() == 2 and _multiplies(model, name)


def _ranges(parameter: torch.Tensor, pieces: Pieces) -> bool:
    """Whether each matrix is of one flat range of each of its stored tensors."""
    rows = max(1, parameter.shape[-2])
    seen = {(piece.name, piece.at // rows) for piece in pieces}
    turned = all(piece.turned for piece in pieces) and parameter.dim() == 3
    return (
        0 < len(pieces) == len(seen)
        and all(piece.step == 1 for piece in pieces)
        and (turned or not any(piece.turned for piece in pieces))
    )


def _weights(target: str, parameter: torch.Tensor, pieces: Pieces) -> list[WeightSpec]:
    """Return a weight for each matrix of a parameter, as it is stored."""
    *_, rows, cols = parameter.shape
    routed = parameter.dim() == 3
    parts: dict[int, list[Part]] = {}
    for piece in pieces:
        parts.setdefault(piece.at // rows, []).append(_part(piece, rows))
    shape = (cols, rows) if pieces[0].turned else (rows, cols)
    return [
        WeightSpec(f"{target}.{at}" if routed else target, shape, tuple(each), target, routed)
        for at, each in parts.items()
    ]


def _part(piece: Piece, rows: int) -> Part:
    """Return the flat range of a piece of one of a parameter's matrices of `rows` rows."""
    start = piece.start * (piece.rows if piece.turned else piece.width)
    stop = start + piece.rows * piece.width
    return Part(piece.name, start, stop, piece.at % rows * piece.width)


def _share(model: nn.Module, parameters: Mapping[str, Any], out: Assignment) -> None:
    """Give the weights of claimed parameters to the modules whose parameters are tied to them."""
    tied: Mapping[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    for target, source in tied.items():
        if source not in out.claimed or target in out.claimed or target not in parameters:
            continue
        (name, _, leaf), (owner, _, stored) = target.rpartition("."), source.rpartition(".")
        if owner in out.experts:
            out.experts.setdefault(name, {})[leaf] = out.experts[owner][stored]
            out.transposed |= {target} if source in out.transposed else set()
            out.claimed.add(target)
        elif _multiplies(model, target):
            out.claim(model, target, (out.linears | out.modules)[owner])


def _missing(model: nn.Module, parameters: Mapping[str, Any], found: Sequence[Source]) -> list[str]:
    """Return parameters of the base model that nothing stored fills; new heads are no fault."""
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    prefix = f"{model.base_model_prefix}."
    body = [name for name in parameters if name.startswith(prefix)] or list(parameters)
    made = [name for source in found for name in source.targets]
    known = {*made, *tied, *tied.values()}
    return [name for name in body if name not in known]


def _multiplies(model: nn.Module, target: str) -> bool:
    module_name, _, leaf = target.rpartition(".")
    return leaf == "weight" and is_own(model.get_submodule(module_name))
