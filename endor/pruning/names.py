"""From the tensors of a checkpoint to the parameters of a transformers model, piece by piece.

transformers renames tensors while it loads, and stacks the experts of a mixture into one parameter.
The same rules tell here which rows of which parameter a stored tensor fills, so that one decoder
layer can be loaded, pruned and given back under the names of the checkpoint.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from endor.dependencies import internals
from endor.errors import CheckpointError, PruningError


@dataclass(frozen=True, slots=True)
class Part:
    """Where one stored tensor lies in its parameter.

    Attributes:
        name: The stored tensor.
        expert: Index into the parameter's first dimension; None where it has no such dimension.
        start: First row (of that expert).
        rows: How many.
    """

    name: str
    expert: int | None
    start: int
    rows: int

    def view(self, parameter: torch.Tensor) -> torch.Tensor:
        """Return the rows of `parameter` that the stored tensor fills."""
        whole = parameter if self.expert is None else parameter[self.expert]
        return whole[self.start : self.start + self.rows] if whole.dim() else whole


@dataclass(slots=True)
class _Collected:
    operations: list[tuple[str, int | None]]
    patterns: list[str]
    names: dict[str, list[str]] = field(default_factory=dict)


def map_parts(
    model: nn.Module, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, tuple[Part, ...]]:
    """Return the parts of every parameter and stored buffer of `model`, by its name.

    Args:
        model: On any device, meta included.
        shapes: Of the checkpoint's tensors, by name. Those that the model does not use are left
            out of the result.

    Raises:
        PruningError: a parameter is made by an operation other than renaming, stacking experts
            and concatenating rows.
        CheckpointError: shapes do not fit.
    """
    expected: dict[str, torch.Tensor] = dict(model.state_dict())
    parts = {}
    for target, collected in _collect(model, shapes, expected).items():
        if target in expected:
            parts[target] = _place(target, expected[target].shape, collected, shapes)
    return parts


def _collect(
    model: nn.Module, shapes: Mapping[str, tuple[int, ...]], expected: Mapping[str, torch.Tensor]
) -> dict[str, _Collected]:
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
    mapping: list[Any] = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: entry for entry in converters for pattern in entry.source_patterns}
    prefix = model.base_model_prefix
    found: dict[str, _Collected] = {}
    for name in sorted(shapes, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, prefix, expected)
        if target not in expected and name in expected:
            target, pattern = rename_source_key(name, [], [], prefix, expected)
        if pattern is None:
            found[target] = _Collected([], [name], {name: [name]})
            continue
        entry = by_pattern[pattern]
        steps = [(type(step).__name__, getattr(step, "dim", None)) for step in entry.operations]
        collected = found.setdefault(target, _Collected(steps, list(entry.source_patterns)))
        collected.names.setdefault(pattern, []).append(name)
    return found


def _place(
    target: str, shape: torch.Size, collected: _Collected, shapes: Mapping[str, tuple[int, ...]]
) -> tuple[Part, ...]:
    columns = [collected.names.get(pattern, []) for pattern in collected.patterns]
    steps = collected.operations
    if not steps and len(shape) == 3:
        stacks: list[list[str]] = [[columns[0][0]]]
        _check(target, shape, columns[0][0], shapes)
        return tuple(Part(columns[0][0], index, 0, shape[1]) for index in range(shape[0]))
    if not steps:
        _check(target, shape, columns[0][0], shapes)
        return (Part(columns[0][0], None, 0, shape[0] if shape else 1),)
    if steps == [("Concatenate", 0)]:
        stacks = [[name for names in columns for name in names]]
    elif steps in ([("MergeModulelist", 0)], [("MergeModulelist", 0), ("Concatenate", 1)]):
        if any(len(names) != shape[0] for names in columns):
            raise CheckpointError(
                f"{target}: needs {shape[0]} experts, got {[len(names) for names in columns]}; "
                "finish the download"
            )
        stacks = [list(names) for names in zip(*columns, strict=True)]
    else:
        raise PruningError(
            f"{target}: is made from {columns[0][0]} by {', '.join(step for step, _ in steps)}, "
            "which calibrated pruning cannot undo; prune with magnitude"
        )
    parts = []
    for index, names in enumerate(stacks):
        start = 0
        for name in names:
            rows = shapes[name][0]
            expert = index if len(shape) == 3 and steps != [("Concatenate", 0)] else None
            parts.append(Part(name, expert, start, rows))
            start += rows
        whole = shape[0] if steps == [("Concatenate", 0)] else shape[-2]
        if start != whole:
            raise CheckpointError(
                f"{target}: needs {whole} rows, {', '.join(names)} have {start}; config and "
                "weights do not belong together"
            )
    return tuple(parts)


def _check(
    target: str, shape: torch.Size, name: str, shapes: Mapping[str, tuple[int, ...]]
) -> None:
    if tuple(shape) != shapes[name]:
        raise CheckpointError(
            f"{name}: stored shape {list(shapes[name])} does not fit {target} {list(shape)}; "
            "config and weights do not belong together"
        )
