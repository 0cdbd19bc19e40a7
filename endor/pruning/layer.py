"""The matrices of one decoder layer, and pruning them by the inputs they are given."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from endor.errors import PruningError, QuantizationError
from endor.models.layers import is_own
from endor.models.pieces import Piece, Pieces, count, is_whole
from endor.pruning import stacks
from endor.pruning.contract import Statistics
from endor.pruning.moe import RoutedTokens, is_plain, renew_experts
from endor.pruning.statistics import collect, input_groups, neutral

Batches = Callable[[], Iterator[Callable[[], None]]]
"""Gives functions that run the layer on one batch of calibration windows each."""


@dataclass(frozen=True, slots=True)
class Matrix:
    """One stored matrix, or one expert of a stored stack.

    Attributes:
        name: The stored tensor.
        parameter: The parameter that holds it.
        piece: Where in the parameter, and where in the stored tensor.
        transposed: Whether rows of the parameter are inputs (GPT-2's Conv1D).
    """

    name: str
    parameter: nn.Parameter
    piece: Piece
    transposed: bool

    @property
    def weight(self) -> torch.Tensor:
        """The matrix `(outputs, inputs)`, a view of the parameter."""
        view = self.piece.view(self.parameter)
        return view.T if self.transposed else view

    @property
    def turns(self) -> bool:
        """Whether rows of the stored tensor are inputs."""
        return self.transposed != self.piece.turned

    @property
    def expert(self) -> int:
        """The expert whose matrix this is, or a part of, in a parameter of three dimensions."""
        return self.piece.at // self.parameter.shape[-2]


class LayerMatrices:
    """What is to be pruned or quantised in one filled decoder layer.

    Args:
        layer: The layer.
        parameters: The pieces of its parameters, by name inside the layer.
        selected: Names of the stored tensors to prune.
        shapes: Of the stored tensors.

    Raises:
        PruningError: a selected tensor is no matrix of a linear layer or of fused experts.
    """

    def __init__(
        self,
        layer: nn.Module,
        parameters: Mapping[str, Pieces],
        selected: frozenset[str],
        shapes: Mapping[str, tuple[int, ...]],
    ) -> None:
        from transformers.pytorch_utils import Conv1D

        self._layer = layer
        self._shapes = shapes
        self.linears: dict[str, list[Matrix]] = {}
        self.experts: dict[str, dict[str, list[Matrix]]] = {}
        self.stacks: dict[str, list[Matrix]] = {}
        for name, pieces in parameters.items():
            wanted = [piece for piece in pieces if piece.name in selected]
            if not wanted:
                continue
            module_name, _, leaf = name.rpartition(".")
            module = layer.get_submodule(module_name)
            parameter = getattr(module, leaf)
            conv = isinstance(module, Conv1D)
            matrices = [Matrix(piece.name, parameter, piece, conv) for piece in wanted]
            if leaf == "weight" and (conv or isinstance(module, nn.Linear)):
                self.linears[module_name] = matrices
            elif leaf in ("gate_up_proj", "down_proj") and is_plain(module):
                self.experts.setdefault(module_name, {})[leaf] = matrices
            elif parameter.dim() == 3 and is_own(module):
                self.stacks[name] = matrices
            else:
                raise PruningError(
                    f"{wanted[0].name}: is the {leaf} of {type(module).__name__}, whose inputs "
                    "calibrated pruning does not know; leave it out (--exclude), or prune with "
                    "magnitude"
                )

        for name, matrices in self.by_name().items():
            covered = sum(matrix.piece.rows * matrix.piece.width for matrix in matrices)
            if covered != count(shapes[name]):
                raise PruningError(
                    f"{name}: is only in part of the matrices of one layer, which calibrated "
                    "pruning does not follow; leave it out (--exclude), or prune with magnitude"
                )

    def by_name(self) -> dict[str, list[Matrix]]:
        """Return the matrices of each stored tensor."""
        found: dict[str, list[Matrix]] = {}
        for matrix in self.all:
            found.setdefault(matrix.name, []).append(matrix)
        return found

    @property
    def all(self) -> list[Matrix]:
        """Every matrix."""
        found = [matrix for matrices in self.linears.values() for matrix in matrices]
        for parameters in self.experts.values():
            found += [matrix for matrices in parameters.values() for matrix in matrices]
        return found + [matrix for matrices in self.stacks.values() for matrix in matrices]

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield the stored tensors with their present values, float32, by name."""
        for name, matrices in self.by_name().items():
            shape, parameter = self._shapes[name], matrices[0].parameter.data
            if is_whole([matrix.piece for matrix in matrices], parameter.shape, self._shapes):
                yield name, parameter
                continue
            stored = torch.empty(shape, device=parameter.device)
            for matrix in matrices:
                matrix.piece.stored(stored).copy_(matrix.piece.view(matrix.parameter.data))
            yield name, stored

    def load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Set all matrices from stored tensors."""
        for matrix in self.all:
            view = matrix.piece.view(matrix.parameter.data)
            view.copy_(matrix.piece.stored(tensors[matrix.name]))

    def rewrite(
        self,
        solve: Callable[[Matrix, torch.Tensor], torch.Tensor],
        kind: Statistics,
        batches: Batches,
        room: Callable[[int], Any],
        *,
        sequential: bool,
    ) -> dict[str, float]:
        """Replace every matrix and return the relative output errors, the largest of each tensor.

        The error of a matrix is tr(D H Dᵀ) / tr(W H Wᵀ) with D the change, H = mean x xᵀ (its
        diagonal, if only that is collected).

        Args:
            solve: Takes a matrix and the statistic of its inputs; returns its new weight.
            kind: Which statistic.
            batches: See `Batches`.
            room: Gives activations with room for the inputs of that many features.
            sequential: Whether matrices are given what the new ones before them yield, which
                takes one (partial) forward for each group of matrices that share an input.
        """
        errors: dict[str, float] = {}

        def renew(matrix: Matrix, statistic: torch.Tensor) -> None:
            weight = matrix.weight
            try:
                found = solve(matrix, statistic)
            except (PruningError, QuantizationError) as error:
                raise type(error)(f"{matrix.name}: {error}") from None
            if not bool(torch.isfinite(found).all()):
                raise PruningError(
                    f"{matrix.name}: came out as NaN or infinity; use a larger dampening"
                )
            change = relative_error(weight, found, statistic)
            errors[matrix.name] = max(errors.get(matrix.name, 0.0), change)
            weight.copy_(found)

        modules = {name: self._layer.get_submodule(name) for name in self.linears}
        modules |= {name: self._layer.get_submodule(name) for name in self.experts}
        groups = input_groups(modules, next(batches())) if modules else ()
        passes = [(group,) for group in groups] if sequential else [groups]
        for together in passes:
            leaders = [group[0] for group in together if group[0] in self.linears]
            routed = {
                name: self._routed_tokens(name, room)
                for group in together
                for name in group
                if name in self.experts
            }
            with _recorded(self._layer, routed):
                found = collect(modules, leaders, batches(), kind, stop=sequential and not routed)
            for group in together:
                for name in group:
                    if name in routed:
                        experts = self._by_expert(name)
                        renew_experts(modules[name], routed[name], kind, experts, renew)
                        routed[name].close()
                        continue
                    for matrix in self.linears[name]:
                        statistic = found.get(group[0])
                        if statistic is None:  # no token came here: all inputs count the same
                            statistic = neutral(matrix.weight.shape[1], kind, matrix.weight.device)
                        renew(matrix, statistic)
        self._renew_stacks(batches, kind, renew)
        return errors

    def _renew_stacks(
        self, batches: Batches, kind: Statistics, renew: Callable[[Matrix, torch.Tensor], None]
    ) -> None:
        """Renew stacks of experts of any form, in the order of use."""
        if not self.stacks:
            return
        for use in stacks.uses(self._layer, list(self.stacks), next(batches())):
            by_expert: dict[int, list[Matrix]] = {}
            for matrix in self.stacks[use.name]:
                by_expert.setdefault(matrix.expert, []).append(
                    replace(matrix, transposed=use.turned)
                )

            def take(
                expert: int,
                statistic: torch.Tensor,
                by_expert: dict[int, list[Matrix]] = by_expert,
            ) -> None:
                for matrix in by_expert.get(expert, []):
                    renew(matrix, statistic)

            stacks.statistics(self._layer, use, batches, kind, take)

    def _routed_tokens(self, name: str, room: Callable[[int], Any]) -> RoutedTokens:
        module: Any = self._layer.get_submodule(name)
        return RoutedTokens(room(module.gate_up_proj.shape[2]), module.num_experts)

    def _by_expert(self, name: str) -> dict[str, list[list[Matrix]]]:
        module: Any = self._layer.get_submodule(name)
        found: dict[str, list[list[Matrix]]] = {
            leaf: [[] for _ in range(module.num_experts)] for leaf in ("gate_up_proj", "down_proj")
        }
        for leaf, matrices in self.experts[name].items():
            for matrix in matrices:
                found[leaf][matrix.expert].append(matrix)
        return found


@contextmanager
def _recorded(layer: nn.Module, routed: Mapping[str, RoutedTokens]) -> Iterator[None]:
    """Record what experts modules are given."""

    def hook(tokens: RoutedTokens) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def record(_module: nn.Module, args: tuple[Any, ...]) -> None:
            tokens.add(args[0].reshape(-1, args[0].shape[-1]), args[1])

        return record

    handles = [
        layer.get_submodule(name).register_forward_pre_hook(hook(tokens))
        for name, tokens in routed.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def relative_error(dense: torch.Tensor, pruned: torch.Tensor, statistic: torch.Tensor) -> float:
    """Return tr(D H Dᵀ) / tr(W H Wᵀ) for D = pruned - dense; H may be given by its diagonal."""

    def energy(weight: torch.Tensor) -> float:
        if statistic.dim() == 1:
            return float((weight.square() @ statistic).sum())
        return float(((weight @ statistic) * weight).sum())

    whole = energy(dense)
    return energy(pruned - dense) / whole if whole > 0 else 0.0
