"""Masks of a pruned model: stored as bitmaps, read back, and held while survivors are trained.

A mask file is a safetensors file. A matrix NAME of shape `(..., rows, cols)` is two tensors in it,
as in compressed-tensors' `sparse-bitmask` format: `NAME.bitmask`, uint8 `(rows, ceil(cols / 8))`
with all leading dimensions in `rows`, 1 = kept, least significant bit first, unused bits 0; and
`NAME.shape`, int64. The metadata entry `endor.masks` is a JSON object: how they were found.
"""

import math
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from endor.errors import CheckpointError, ConfigError, PruningError, ShapeError
from endor.jsontext import parse_object

if TYPE_CHECKING:
    import torch
    from torch import nn

KEY = "endor.masks"
BITMASK, SHAPE = ".bitmask", ".shape"


def bitmask_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """Return the shape of the bitmask of a tensor of `shape`."""
    return math.prod(shape[:-1]), -(-shape[-1] // 8)


def to_bitmask(kept: np.ndarray) -> np.ndarray:
    """Return the bitmask of bool `kept` (at least one dimension)."""
    return np.packbits(kept.reshape(-1, kept.shape[-1]), axis=1, bitorder="little")


def load_masks(path: Path | str) -> "dict[str, torch.Tensor]":
    """Return masks by tensor name: bool, of the tensor's shape, True = kept.

    Args:
        path: What `endor prune --mask-only` wrote; or a pruned checkpoint, dense or packed, whose
            layer matrices' non-zeros are kept.

    Raises:
        CheckpointError: It is neither, or damaged.
        OSError: It cannot be read.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    if path.is_dir():
        return _non_zeros(path)
    try:
        with safe_open(path, framework="np") as file:
            if KEY not in (file.metadata() or {}):
                return _non_zeros(path)
            parts = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise CheckpointError(f"{path}: must be a safetensors file: {error}") from None
    names = [part.removesuffix(BITMASK) for part in parts if part.endswith(BITMASK)]
    return {name: _mask(path, name, parts) for name in names}


def describe_masks(path: Path | str) -> dict[str, Any]:
    """Return how the masks in a mask file were found: method, sparsity, pattern, and so on.

    Raises:
        CheckpointError: `path` is no mask file.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np") as file:
            text = (file.metadata() or {}).get(KEY)
    except SafetensorError as error:
        raise CheckpointError(f"{path}: must be a safetensors file: {error}") from None
    if text is None:
        raise CheckpointError(f"{path}: holds no masks; write some with endor prune --mask-only")
    return parse_object(text, f"{path}: metadata {KEY!r}")


def _mask(path: Path, name: str, parts: Mapping[str, np.ndarray]) -> "torch.Tensor":
    import torch

    bitmask = parts[name + BITMASK]
    shape = tuple(int(size) for size in parts.get(name + SHAPE, np.empty(0)))
    if not shape or min(shape) < 0 or bitmask.dtype != np.uint8:
        raise CheckpointError(f"{path}: {name}: needs a shape and a bitmask of uint8")
    if bitmask.shape != bitmask_shape(shape):
        raise CheckpointError(
            f"{path}: {name}{BITMASK}: must be {list(bitmask_shape(shape))} for a tensor of "
            f"{list(shape)}, got {list(bitmask.shape)}"
        )
    bits = np.unpackbits(bitmask, axis=1, bitorder="little")
    if bits[:, shape[-1] :].any():
        raise CheckpointError(f"{path}: {name}{BITMASK}: has bits past column {shape[-1]}")
    return torch.from_numpy(np.ascontiguousarray(bits[:, : shape[-1]]).view(bool).reshape(shape))


def _non_zeros(path: Path) -> "dict[str, torch.Tensor]":
    import torch

    from endor.checkpoint import open_source
    from endor.checkpoint.select import select

    masks = {}
    with closing(open_source(path)) as source:
        for name in sorted(select(source.tensors.values())):
            tensor = source.tensors[name]
            raw = np.empty(tensor.nbytes, dtype=np.uint8)
            source.read_into(name, raw)
            masks[name] = torch.from_numpy(raw.view(tensor.dtype.uint).reshape(tensor.shape) != 0)
    if all(bool(mask.all()) for mask in masks.values()):
        raise CheckpointError(
            f"{path}: has no zeros in its layers, so there is no mask to hold; prune it first, or "
            "give the file that endor prune --mask-only wrote"
        )
    return masks


class HeldMasks:
    """Keeps masked weights at +0.0 under any optimizer; a context manager, see `hold_masks`."""

    def __init__(self, masks: "Mapping[nn.Parameter, torch.Tensor]") -> None:
        from torch.optim.optimizer import register_optimizer_step_post_hook

        self._absent = {parameter: ~mask for parameter, mask in masks.items()}
        self._handles: list[Any] = [
            parameter.register_post_accumulate_grad_hook(self._mask_gradient)  # type: ignore[no-untyped-call]
            for parameter in self._absent
            if parameter.requires_grad
        ]
        self._handles.append(register_optimizer_step_post_hook(lambda *_: self.apply()))
        self.apply()

    def apply(self) -> None:
        """Set the masked weights to +0.0; for updates that are made outside of an optimizer."""
        for parameter in self._absent:
            parameter.data.masked_fill_(self._absent_in(parameter), 0)

    def remove(self) -> None:
        """Let go of the weights; they stay as they are."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    @property
    def sparsity(self) -> float:
        """Share of the masked weights in the matrices that have a mask."""
        weights = sum(absent.numel() for absent in self._absent.values())
        return sum(int(absent.sum()) for absent in self._absent.values()) / max(weights, 1)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.remove()

    def _mask_gradient(self, parameter: "torch.Tensor") -> None:
        if parameter.grad is not None:
            parameter.grad.masked_fill_(self._absent_in(parameter), 0)

    def _absent_in(self, parameter: Any) -> "torch.Tensor":
        absent = self._absent[parameter]
        if absent.device != parameter.device:
            absent = self._absent[parameter] = absent.to(parameter.device)
        return absent


def hold_masks(model: "nn.Module", masks: "Mapping[str, torch.Tensor]") -> HeldMasks:
    """Set the masked weights of `model` to zero and keep them there while it is trained.

    Gradients of masked weights are zero, so they count neither for clipping nor for momentum; and
    after each step of any `torch.optim.Optimizer` the weights are set to +0.0 again, whatever
    weight decay or whitening has made of them. Parameters, their names and the optimizer's state
    stay what they are: checkpoints are saved as usual. Sharded parameters (FSDP, ZeRO-3) are not
    supported.

    Args:
        model: Dense, from transformers or with parameters named like the masks.
        masks: Bool, True = kept, by name of the checkpoint's tensors (as from `load_masks`) or of
            the model's parameters.

    Raises:
        ConfigError: There are no masks, or one belongs to no parameter of the model.
        CheckpointError, PruningError: shapes do not fit, or some experts of a layer lack a mask.
    """
    import torch

    from endor.models.mapping import map_parameters

    parameters = dict(model.named_parameters())
    shapes = {name: tuple(mask.shape) for name, mask in masks.items()}
    try:
        mapped = map_parameters(model, shapes)
    except ShapeError as error:
        raise CheckpointError(str(error)) from None
    pieces = {name: mapped.pieces[name] for name in sorted(mapped.pieces.keys() & parameters)}
    for name in sorted(mapped.otherwise.keys() & parameters):
        raise PruningError(f"{name}: {mapped.otherwise[name]}, through which masks cannot pass")
    missing = sorted(masks.keys() - {piece.name for each in pieces.values() for piece in each})
    if missing or not masks:
        raise ConfigError(
            f"{missing[0] if missing else 'masks'}: no parameter of {type(model).__name__} has "
            "this name; give masks of this model, and the dense model (not a packed one)"
        )
    found = {}
    for name in pieces:
        parameter = parameters[name]
        whole = torch.ones(parameter.shape, dtype=torch.bool, device=parameter.device)
        for piece in pieces[name]:
            piece.view(whole).copy_(piece.stored(masks[piece.name]))
        found[parameter] = whole
    return HeldMasks(found)
