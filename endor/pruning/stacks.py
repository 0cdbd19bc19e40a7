"""Stacks of experts' matrices of any form: what each is multiplied with, seen where it happens.

A parameter `(experts, rows, cols)` is replaced by something that hands out the same matrices and
notes their inputs. It needs no knowledge of what the module does between one matrix and the next,
nor of whether rows or columns are outputs: that follows from the product.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from endor.errors import PruningError
from endor.models.nested import map_nested
from endor.pruning.contract import Statistics
from endor.pruning.statistics import moment, neutral

GRAM_BYTES = 1 << 30
"""Statistics of as many experts are collected in one pass over the tokens as fit in this."""

Seen = Callable[[int, torch.Tensor, bool], None]
"""Takes an expert's number, what its matrix multiplies, and whether its rows are inputs."""


class _Slice(torch.Tensor):
    """One expert's matrix, which notes what it is multiplied with."""

    seen: Callable[[torch.Tensor, bool], None]
    turned: bool

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        name = getattr(func, "__name__", "")
        second = args[1] if len(args) > 1 else None
        if isinstance(second, cls):
            if func is F.linear:
                second.seen(args[0], second.turned)
            elif name in _PRODUCTS:
                second.seen(args[0], not second.turned)
        with torch._C.DisableTorchFunctionSubclass():
            found = func(*args, **(kwargs or {}))
        first = args[0] if args else None
        if isinstance(first, cls) and isinstance(found, torch.Tensor) and found.dim() == 2:
            turns = name in _TRANSPOSES or func == torch.Tensor.T.__get__  # type: ignore[attr-defined]
            if turns or name in _SAME:
                return _slice(found, first.seen, first.turned != turns)
        return found


_PRODUCTS = frozenset({"matmul", "__matmul__", "mm"})
_TRANSPOSES = frozenset({"t", "transpose", "permute", "swapaxes"})
_SAME = frozenset({"to", "contiguous", "float", "detach", "type_as", "clone"})


def _slice(
    matrix: torch.Tensor, seen: Callable[[torch.Tensor, bool], None], turned: bool
) -> _Slice:
    out = matrix.as_subclass(_Slice)
    out.seen, out.turned = seen, turned
    return out


class WatchedStack:
    """Stands for a parameter `(experts, rows, cols)`."""

    def __init__(self, parameter: torch.Tensor, seen: Seen) -> None:
        self._parameter = parameter
        self._seen = seen

    def __len__(self) -> int:
        return len(self._parameter)

    def __getitem__(self, index: Any) -> torch.Tensor:
        single = isinstance(index, int) or (isinstance(index, torch.Tensor) and index.numel() == 1)
        if not single:
            return self._parameter[index]
        expert = int(index)
        return _slice(
            self._parameter[expert], lambda given, turned: self._seen(expert, given, turned), False
        )

    def __getattr__(self, name: str) -> Any:
        return getattr(self._parameter, name)

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        second = args[1] if len(args) > 1 else None
        if isinstance(second, cls) and getattr(func, "__name__", "") in (*_PRODUCTS, "bmm"):
            given = args[0]
            if given.dim() == 3 and len(given) == len(second):
                for expert in range(len(second)):
                    second._seen(expert, given[expert], True)

        def plain(item: Any) -> Any:
            return item._parameter if isinstance(item, cls) else item

        return func(*map_nested(plain, tuple(args)), **map_nested(plain, dict(kwargs or {})))


@dataclass(frozen=True, slots=True)
class Use:
    """How a stack is used.

    Attributes:
        name: The parameter, by its name inside the layer.
        turned: Whether the rows of its matrices are inputs.
    """

    name: str
    turned: bool


def uses(layer: nn.Module, names: Sequence[str], run: Callable[[], None]) -> list[Use]:
    """Return the stacks in the order in which `run` uses them.

    Raises:
        PruningError: One is multiplied with nothing that can be seen.
    """
    found: dict[str, bool] = {}
    _watch(
        layer,
        {name: lambda _, __, turned, name=name: found.setdefault(name, turned) for name in names},
        run,
    )
    unseen = [name for name in names if name not in found]
    if unseen:
        module = layer.get_submodule(unseen[0].rpartition(".")[0])
        raise PruningError(
            f"{unseen[0]}: {type(module).__name__} uses its experts in a way that calibrated "
            "pruning does not see; leave them out (--exclude), or prune with magnitude"
        )
    return [Use(name, turned) for name, turned in found.items()]


def statistics(
    layer: nn.Module,
    use: Use,
    batches: Callable[[], Iterable[Callable[[], None]]],
    kind: Statistics,
    take: Callable[[int, torch.Tensor], None],
) -> None:
    """Call `take(expert, mean statistic)` for every expert of a stack.

    An expert that is routed fewer tokens than its matrix has inputs is given the mean over all
    experts' tokens for those that are missing; where no expert is routed any, all inputs count the
    same.
    """
    parameter = layer.get_parameter(use.name)
    experts, width = len(parameter), parameter.shape[1 if use.turned else 2]
    step = max(1, GRAM_BYTES // (4 * width * (width if kind == "gram" else 1)))
    mean: torch.Tensor | None = None
    for first in range(0, experts, step):
        wanted = range(experts) if mean is None else range(first, min(first + step, experts))
        sums = _Sums(range(first, min(first + step, experts)), wanted, kind)
        _watch(layer, {use.name: sums.add}, lambda: _run(batches()))
        if mean is None:
            mean = sums.mean(width, parameter.device)
        for expert in sums.group:
            missing = max(0, width - sums.tokens[expert])
            own = sums.of.get(expert, torch.zeros_like(mean))
            take(expert, (own + missing * mean) / max(1, sums.tokens[expert] + missing))


class _Sums:
    """Moments of the inputs of a group of experts, each by itself, and of all that are wanted.

    Args:
        group: Experts whose moments are kept.
        wanted: Experts whose moments count in the mean.
        kind: "diagonal" or "gram".
    """

    def __init__(self, group: range, wanted: range, kind: Statistics) -> None:
        self.group = group
        self.of: dict[int, torch.Tensor] = {}
        self.tokens = dict.fromkeys(group, 0)
        self._wanted = wanted
        self._kind: Statistics = kind
        self._rest: torch.Tensor | None = None
        self._rest_tokens = 0

    def add(self, expert: int, given: torch.Tensor, _turned: bool) -> None:
        if expert not in self._wanted or not given.numel():
            return
        rows = given.detach().reshape(-1, given.shape[-1]).float()
        found = moment(rows, self._kind)
        if expert in self.tokens:
            self.of[expert] = self.of[expert].add_(found) if expert in self.of else found
            self.tokens[expert] += len(rows)
        else:
            self._rest = found if self._rest is None else self._rest.add_(found)
            self._rest_tokens += len(rows)

    def mean(self, width: int, device: torch.device) -> torch.Tensor:
        """Return the mean over the tokens of all experts that are wanted."""
        tokens = sum(self.tokens.values()) + self._rest_tokens
        if not tokens:
            return neutral(width, self._kind, device)
        parts = [*self.of.values(), *([] if self._rest is None else [self._rest])]
        return sum(parts[1:], parts[0]) / tokens


def _run(batches: Iterable[Callable[[], None]]) -> None:
    for batch in batches:
        batch()


def _watch(layer: nn.Module, seen: Mapping[str, Any], run: Callable[[], None]) -> None:
    """Run with the stacks replaced by ones that call `seen`."""
    taken: list[tuple[nn.Module, str, nn.Parameter]] = []
    try:
        for name, sink in seen.items():
            module_name, _, leaf = name.rpartition(".")
            module = layer.get_submodule(module_name)
            parameter = module._parameters.pop(leaf)
            assert parameter is not None
            taken.append((module, leaf, parameter))
            module.__dict__[leaf] = WatchedStack(parameter.detach(), sink)
        run()
    finally:
        for module, leaf, parameter in taken:
            module.__dict__.pop(leaf, None)
            module._parameters[leaf] = parameter
