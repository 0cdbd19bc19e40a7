"""Several CUDA devices: contiguous ranges of layers, and hidden states that move between them."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from endor.models.layers import largest_list

_CONTAINERS = (nn.ModuleList, nn.ModuleDict)


def layer_ranges(
    model: Any, layer_bytes: Mapping[str, int], budgets: Mapping[str, int], mode: str
) -> dict[str, str]:
    """Return a device per module prefix: contiguous ranges of the decoder layers.

    What comes before the layers goes with the first range, what comes after them with the last,
    unless it shares the embeddings' weight.

    Args:
        model: A model with a list of layers; without one, everything goes to the first device.
        layer_bytes: Bytes per module name: what all parameters below it and its cache take.
        budgets: Memory per device, in the order of use.
        mode: `sequential` fills one device after the other; `balanced_low_0` gives the first only
            what the others cannot hold; anything else shares in proportion to the budgets.
    """
    devices = list(budgets)
    places = {"": devices[0]}
    found = largest_list(model, layer_bytes)
    if found is None or len(devices) == 1:
        return places
    container, count = found
    sizes = [layer_bytes.get(f"{container}.{at}", 0) for at in range(count)]
    rest = layer_bytes.get("", 0) - sum(sizes)
    after = [name for name in _after(model, container) if not _is_tied(model, name)]
    tail = sum(layer_bytes.get(name, 0) for name in after)
    line = [rest - tail, *sizes, tail]
    chosen = _cut(line, _shares(sum(line), list(budgets.values()), mode))
    for at, device in enumerate(chosen[1:-1]):
        places[f"{container}.{at}"] = devices[device]
    places[""] = devices[chosen[0]]
    return places | {name: devices[chosen[-1]] for name in after}


def _shares(total: int, budgets: Sequence[int], mode: str) -> list[float]:
    """Return how many bytes each device is to take, in order; their sum is at least `total`."""
    even = [total * budget / sum(budgets) for budget in budgets]
    if mode == "sequential" and total <= sum(budgets):
        return [*budgets[:-1], float(total)]
    if mode == "balanced_low_0" and total <= sum(budgets):
        others = sum(budgets[1:])
        first = max(0, total - others)
        return [first, *((total - first) * budget / others for budget in budgets[1:])]
    return even


def _cut(line: Sequence[int], shares: Sequence[float]) -> list[int]:
    """Return the device of each piece of a line: that in whose share its middle lies."""
    chosen, at, bound, seen = [], 0, shares[0], 0.0
    for piece in line:
        while seen + piece / 2 > bound and at + 1 < len(shares):
            at += 1
            bound += shares[at]
        chosen.append(at)
        seen += piece
    return chosen


def _after(model: nn.Module, container: str) -> list[str]:
    """Return the modules that follow the layers, at each level above them."""
    out = []
    while container:
        parent, _, leaf = container.rpartition(".")
        names = [name for name, _ in model.get_submodule(parent).named_children()]
        for name in names[names.index(leaf) + 1 :]:
            path = f"{parent}.{name}" if parent else name
            if any(True for _ in model.get_submodule(path).parameters()) or hasattr(
                model.get_submodule(path), "in_features"
            ):
                out.append(path)
        container = parent
    return out


def _is_tied(model: Any, name: str) -> bool:
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    return any(key.startswith(f"{name}.") for key in tied)


def place_parameters(model: nn.Module, places: Mapping[str, torch.device]) -> None:
    """Move every parameter and buffer to the device of its module's longest prefix.

    Packed weights are none of them. A shared parameter goes where it is met first.
    """
    done: dict[int, nn.Parameter] = {}
    for name, module in model.named_modules():
        device = places[prefix_of(name, places)]
        for key, parameter in module._parameters.items():
            if parameter is None:
                continue
            if id(parameter) not in done and parameter.device != device:
                new = nn.Parameter(parameter.data.to(device), parameter.requires_grad)
                done[id(parameter)] = done[id(new)] = new
            module._parameters[key] = done.setdefault(id(parameter), parameter)
        for key, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[key] = buffer.to(device)


def move_between(model: nn.Module, places: Mapping[str, torch.device]) -> list[str]:
    """Have each module that begins on a device take its inputs there; return their names.

    The model's outputs come back to the device of its inputs. Caches of keys and values are left
    where their layers are.
    """
    hooked = []
    for name, module in model.named_modules():
        prefix = prefix_of(name, places)
        if name and not isinstance(module, _CONTAINERS) and _begins(model, name, prefix):
            module.register_forward_pre_hook(_Inputs(places[prefix]), with_kwargs=True)
            hooked.append(name)
    model.register_forward_hook(_outputs, with_kwargs=True)
    return hooked


def stay_on_device(model: nn.Module) -> None:
    """Have experts ask the next layer's router only where that is on their own device."""
    for module in model.modules():
        following = module.__dict__.get("_endor_next")
        if following is None:
            continue
        both: tuple[Any, Any] = (module, following.experts)
        movers = [experts._stacks[0].weights[0].mover for experts in both]
        if movers[0] is not movers[1]:
            del module.__dict__["_endor_next"]


def prefix_of(name: str, places: Mapping[str, Any]) -> str:
    """Return the longest prefix of `name` that has a place; `""` must have one."""
    while name not in places:
        name = name.rpartition(".")[0]
    return name


def _begins(model: nn.Module, name: str, prefix: str) -> bool:
    """Whether a module is called from outside its prefix: it is the prefix, or stands for it.

    Lists are not called, so what they hold stands for them; and the root's own leaves may be
    called from anywhere.
    """
    if not prefix:
        return next(model.get_submodule(name).children(), None) is None
    parent = name
    while parent != prefix:
        parent = parent.rpartition(".")[0]
        if not isinstance(model.get_submodule(parent), _CONTAINERS):
            return False
    return True


class _Inputs:
    """Moves a module's inputs to its device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        return moved(args, self._device), moved(kwargs, self._device)


def _outputs(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
    """Move what a model returns to the device of its first input."""
    first = next((v for v in (*args, *kwargs.values()) if isinstance(v, torch.Tensor)), None)
    return output if first is None else moved(output, first.device)


def moved(value: Any, device: torch.device) -> Any:
    """Return `value` with its tensors on `device`; what holds none is returned as it is."""
    if isinstance(value, torch.Tensor):
        return value if value.device == device else value.to(device, non_blocking=True)
    if isinstance(value, tuple | list):
        items = [moved(item, device) for item in value]
        if all(new is old for new, old in zip(items, value, strict=True)):
            return value
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if isinstance(value, dict):
        changed = {key: moved(item, device) for key, item in value.items()}
        if all(changed[key] is value[key] for key in changed):
            return value
        return type(value)(**changed) if hasattr(value, "to_tuple") else changed
    return value
