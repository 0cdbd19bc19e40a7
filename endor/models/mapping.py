"""From the tensors of a checkpoint to the parameters of a transformers model.

transformers renames tensors while it loads them, and stacks, concatenates, splits or re-orders
some. The same rules are followed here, without a weight: its own operations are run on the numbers
of the rows, and what comes out says which row of which stored tensor every row of a parameter is.
So packed weights stay packed, and a decoder layer can be given back under the checkpoint's names.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from endor.dependencies import changed, internals
from endor.errors import CheckpointError
from endor.models.pieces import TENSOR, Piece, Pieces, count, runs, wrong_shape

Shapes = Mapping[str, tuple[int, ...]]

_MOVES = frozenset(
    (
        *("Chunk", "Split", "Concatenate", "MergeModulelist", "Interleave", "PermuteForRope"),
        "ErnieFuseAndSplitTextVisionExperts",
    )
)
"""Operations that move whole rows, whatever is in them."""

_UNSCALES = frozenset(["Inkling2LoopDequantizeExperts"])
"""Operations that leave a tensor as it is when it comes without scales."""


@dataclass(slots=True)
class Source:
    """Stored tensors, and the parameters that are made of them.

    Attributes:
        targets: The parameters; the model may lack them.
        operations: transformers' own, in their order.
        patterns: Of the stored names, with their targets' patterns: what operations know of names.
        tensors: Stored names per pattern, in natural order.
    """

    targets: list[str]
    operations: list[Any] = field(default_factory=list)
    patterns: tuple[list[str], list[str]] = ((), ())  # type: ignore[assignment]
    tensors: dict[str, list[str]] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        """The stored tensors, those of each pattern together."""
        return [name for pattern in self.patterns[0] for name in self.tensors.get(pattern, [])]

    @property
    def how(self) -> str:
        """The names of the operations."""
        return ", ".join(type(step).__name__ for step in self.operations)

    def pieces(
        self, model: nn.Module, expected: Mapping[str, torch.Tensor], shapes: Shapes
    ) -> dict[str, Pieces] | None:
        """Return the pieces of each target, in the order of its rows; None if made otherwise.

        Those of a parameter of three dimensions end where its matrices do.

        Args:
            model: Whose parameters they are.
            expected: Its parameters and buffers, on any device.
            shapes: Of the stored tensors.

        Raises:
            ShapeError: Shapes do not fit.
            CheckpointError: Some experts are missing.
        """
        if any(target not in expected for target in self.targets):
            return None
        wanted = {target: tuple(expected[target].shape) for target in self.targets}
        steps = [type(step).__name__ for step in self.operations]
        if len(self.names) == 1:
            steps = [step for step in steps if step not in _UNSCALES]
        if not steps:
            return self._as_it_is(wanted, shapes)
        if steps == ["Transpose"]:
            return self._turned(wanted, shapes)
        if not _MOVES.issuperset(steps):
            return None
        self._check_experts(steps, wanted)
        return self._moved(model, wanted, shapes)

    def _as_it_is(
        self, wanted: Mapping[str, tuple[int, ...]], shapes: Shapes
    ) -> dict[str, Pieces] | None:
        if len(self.names) != 1 or len(wanted) != 1:
            return None
        (target, shape), name = next(iter(wanted.items())), self.names[0]
        if shapes[name] != shape:
            raise wrong_shape(name, shapes[name], target, shape)
        width = shape[-1] if len(shape) > 1 else 1
        rows = count(shape) // max(1, width)
        each = shape[1] if len(shape) == 3 else rows
        if not rows * width:
            return {target: ()}
        return {target: tuple(Piece(name, at, 1, at, each, width) for at in range(0, rows, each))}

    def _turned(
        self, wanted: Mapping[str, tuple[int, ...]], shapes: Shapes
    ) -> dict[str, Pieces] | None:
        """Return the pieces where every matrix is stored transposed."""
        (target, shape), name = next(iter(wanted.items())), self.names[0]
        step = self.operations[0]
        whole = len(self.names) == 1 == len(wanted) and len(shape) in (2, 3)
        if not whole or {step.dim0 % len(shape), step.dim1 % len(shape)} != {
            len(shape) - 2,
            len(shape) - 1,
        }:
            return None
        if getattr(step, "check_dims", False) and shapes[name] == shape:
            return self._as_it_is(wanted, shapes)
        *lead, rows, width = shape
        if shapes[name] != (*lead, width, rows):
            raise wrong_shape(name, shapes[name], target, shape)
        return {
            target: tuple(
                Piece(name, each * width, 1, each * rows, rows, width, turned=True)
                for each in range(count(lead) if rows * width else 0)
            )
        }

    def _check_experts(self, steps: Iterable[str], wanted: Mapping[str, tuple[int, ...]]) -> None:
        """Raise `CheckpointError` unless every stack has a tensor for each expert."""
        if not {"MergeModulelist", "ErnieFuseAndSplitTextVisionExperts"}.intersection(steps):
            return
        experts = sum(shape[0] for shape in wanted.values())
        for pattern in self.patterns[0]:
            found = len(self.tensors.get(pattern, []))
            if found != experts:
                raise CheckpointError(
                    f"{', '.join(wanted)}: needs {experts} tensors {pattern}, got {found}; the "
                    "checkpoint is incomplete: download or convert it again"
                )

    def _moved(
        self, model: nn.Module, wanted: Mapping[str, tuple[int, ...]], shapes: Shapes
    ) -> dict[str, Pieces] | None:
        """Return the pieces by running the operations on row numbers."""
        flat = all(len(shapes[name]) < 2 for name in self.names)
        if not flat and any(len(shapes[name]) < 2 for name in self.names):
            return None
        widths = {1 if flat else shapes[name][-1] for name in self.names}
        rows = {name: shapes[name] if flat else shapes[name][:-1] for name in self.names}
        begins = {name: TENSOR * at for at, name in enumerate(self.names)}
        given = {
            pattern: [
                torch.arange(count(rows[name]), device="cpu").view(rows[name]) + begins[name]
                for name in names
            ]
            for pattern, names in self.tensors.items()
        }
        found = self._run(model, given, wanted, shapes)
        if found is None:
            return None
        out = {}
        for target, shape in wanted.items():
            lead = shape if flat else shape[:-1]
            width = 1 if flat else shape[-1]
            if tuple(found[target].shape) != lead or widths != {width}:
                raise wrong_shape(
                    ", ".join(self.names), [shapes[name] for name in self.names], target, shape
                )
            each = shape[1] if len(shape) == 3 and not flat else None
            out[target] = runs(found[target].flatten().numpy(), self.names, width, each)
        return out

    def _run(
        self,
        model: nn.Module,
        given: dict[str, Any],
        wanted: Mapping[str, tuple[int, ...]],
        shapes: Shapes,
    ) -> dict[str, torch.Tensor] | None:
        """Return row numbers by target; None where the operations work on other dimensions."""
        sources, targets = self.patterns
        for step in self.operations:
            if type(step).__name__ in _UNSCALES:
                continue
            try:
                given = step.convert(
                    given,
                    source_patterns=sources,
                    target_patterns=targets,
                    full_layer_name=self.targets[0],
                    model=model,
                    config=getattr(model, "config", None),
                    missing_keys=None,
                )
            except (IndexError, ValueError, AttributeError):
                return None
            except TypeError as error:
                raise changed("transformers", f"{type(step).__name__}.convert: {error}") from None
            except RuntimeError as error:  # from torch: sizes that cannot be put together
                target, shape = next(iter(wanted.items()))
                stored = [shapes[name] for name in self.names]
                raise wrong_shape(", ".join(self.names), stored, target, shape) from error
        if set(given) != set(targets):
            return None
        made = (given[pattern] for pattern in targets)
        return {
            target: item[0] if isinstance(item, list) else item
            for target, item in zip(self.targets, made, strict=True)
        }


def sources(model: nn.Module, names: Iterable[str], quantizer: Any = None) -> list[Source]:
    """Return what becomes of the stored tensors called `names`, by transformers' own renaming.

    Args:
        model: On any device, meta included.
        names: Of the checkpoint's tensors.
        quantizer: transformers' quantizer of the model.

    Raises:
        DependencyError: transformers renames in another way than is known here.
    """
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
    mapping: list[Any] = get_model_conversion_mapping(model, None, quantizer)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: entry for entry in converters for pattern in entry.source_patterns}
    prefix: Any = model.base_model_prefix
    expected = model.state_dict()
    out: dict[str, Source] = {}
    for name in sorted(names, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, prefix, expected)
        if target not in expected and name in expected:
            target, pattern = rename_source_key(name, [], [], prefix, expected)
        if pattern is None:
            out[target] = Source([target], [], ([name], [target]), {name: [name]})
            continue
        entry = by_pattern[pattern]
        first = entry.target_patterns[0]
        source = out.setdefault(
            target,
            Source(
                [target.replace(first, each, 1) for each in entry.target_patterns],
                list(entry.operations),
                (list(entry.source_patterns), list(entry.target_patterns)),
            ),
        )
        source.tensors.setdefault(pattern, []).append(name)
    return list(out.values())


@dataclass(frozen=True, slots=True)
class Mapped:
    """Where the values of a model's parameters and stored buffers are.

    Attributes:
        pieces: By parameter, in the order of its rows.
        otherwise: How the others are made, which pieces cannot say.
    """

    pieces: dict[str, Pieces]
    otherwise: dict[str, str]


def map_parameters(model: nn.Module, shapes: Shapes) -> Mapped:
    """Return the pieces of every parameter and stored buffer of `model` that `shapes` make.

    Args:
        model: On any device, meta included.
        shapes: Of the checkpoint's tensors, by name. Those that the model does not use are left
            out of the result.

    Raises:
        CheckpointError: Some experts are missing.
        ShapeError: Shapes do not fit.
    """
    expected: dict[str, torch.Tensor] = dict(model.state_dict())
    out = Mapped({}, {})
    for source in sources(model, shapes):
        if not any(target in expected for target in source.targets):
            continue
        found = source.pieces(model, expected, shapes)
        if found is not None:
            out.pieces.update(found)
            continue
        how = f"is made from {source.names[0]} by {source.how}"
        out.otherwise.update({name: how for name in source.targets if name in expected})
    return out
