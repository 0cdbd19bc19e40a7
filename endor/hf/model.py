"""What a transformers model with packed weights does differently from one without."""

import os
import shutil
import tempfile
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from endor.checkpoint.companions import source_quantization
from endor.errors import ConfigError, OutputExistsError
from endor.hf.linear import refuse_conversion
from endor.jsontext import read_object
from endor.offload.store import Store

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from endor.offload.planner import Plan

INDEX_NAME = "endor.safetensors.index.json"


def adopt(model: "PreTrainedModel", store: Store, plan: "Plan | None" = None) -> None:
    """Give `model` its store, as `model.endor`, its plan, and the methods that need to know."""
    model.endor = store
    model.endor_plan = plan
    model._endor_loaded = _versions(model)
    for name, function in (
        ("save_pretrained", save_pretrained),
        ("num_parameters", num_parameters),
        ("get_memory_footprint", get_memory_footprint),
        ("_apply", _apply),
    ):
        setattr(model, name, OwnedMethod(function, model))


class OwnedMethod:
    """A method of one model that does not keep the model alive.

    A bound method in the model's own attributes would be a cycle: `del model` would then leave
    gigabytes in memory until the garbage collector comes by.
    """

    __slots__ = ("_function", "_owner")

    def __init__(self, function: Callable[..., Any], owner: "PreTrainedModel") -> None:
        self._function = function
        self._owner = weakref.ref(owner)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._function(self._owner(), *args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> "OwnedMethod":
        """Return the method of the model's copy, which is being made."""
        owner = self._owner()
        return OwnedMethod(self._function, memo.get(id(owner), owner))


def parameter_bytes(model: "PreTrainedModel") -> int:
    """Return the bytes of the parameters and buffers that are not packed."""
    tensors = {id(item): item for item in (*model.parameters(), *model.buffers())}
    return sum(item.numel() * item.element_size() for item in tensors.values())


def num_parameters(
    self: "PreTrainedModel", only_trainable: bool = False, exclude_embeddings: bool = False
) -> int:
    """Return the number of parameters, the packed ones included (they are not trainable)."""
    unpacked: int = type(self).num_parameters(self, only_trainable, exclude_embeddings)
    return unpacked if only_trainable else unpacked + self.endor.numel


def get_memory_footprint(self: "PreTrainedModel", return_buffers: bool = True) -> int:
    """Return the bytes of memory that the weights take: unpacked, packed, staging and scratch."""
    unpacked: int = type(self).get_memory_footprint(self, return_buffers)
    return unpacked + int(self.endor.held_nbytes) + int(self.endor.scratch.nbytes)


def save_pretrained(
    self: "PreTrainedModel",
    save_directory: str | os.PathLike[str],
    is_main_process: bool = True,
    state_dict: dict[str, Any] | None = None,
    push_to_hub: bool = False,
    max_shard_size: int | str | None = None,
    safe_serialization: bool = True,
    **kwargs: Any,
) -> None:
    """Copy the packed files to `save_directory`, with the model's present config.

    Args:
        save_directory: New or empty, or one that holds no weights.
        is_main_process: Nothing is written when False.
        max_shard_size: Ignored: shards are copied as they are.

    Raises:
        ConfigError: Something else than the packed checkpoint is to be saved: a state dict, changed
            parameters, an upload, another format.
        OutputExistsError: The directory holds a packed checkpoint already.
    """
    if state_dict is not None or push_to_hub or not safe_serialization or kwargs.get("variant"):
        raise ConfigError(
            "save_pretrained copies a packed checkpoint: state_dict, push_to_hub, variant and "
            "safe_serialization=False do not apply; unpack it for an ordinary one"
        )
    changed = sorted(_versions(self).items() ^ self._endor_loaded.items())
    if changed:
        raise ConfigError(
            f"{changed[0][0]}: changed since the model was loaded, and save_pretrained only copies "
            "the packed checkpoint; unpack it to save changed weights"
        )
    if not is_main_process:
        return
    target = Path(save_directory)
    if (target / INDEX_NAME).exists():
        raise OutputExistsError(f"{target}: holds a packed checkpoint; choose another directory")
    target.mkdir(parents=True, exist_ok=True)
    sources = [layout.path for layout in self.endor.layouts]
    for source in sources:
        _copy(source, target / source.name)
    self.config.architectures = [type(self).__name__]
    self.config.save_pretrained(target)
    if self.can_generate():
        self.generation_config.save_pretrained(target)
    _copy(sources[0].parent / INDEX_NAME, target / INDEX_NAME)


def _copy(source: Path, target: Path) -> None:
    """Copy a file so that `target` is whole or absent."""
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    os.close(handle)
    try:
        shutil.copyfile(source, name)
        shutil.copymode(source, name)
        with Path(name).open("rb") as file:
            os.fsync(file.fileno())
        Path(name).replace(target)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _versions(model: "PreTrainedModel") -> dict[str, tuple[int, int]]:
    """Return an identity per unpacked parameter that in-place changes and replacement alter."""
    return {name: (id(item), item._version) for name, item in model.named_parameters()}


def _apply(
    self: "PreTrainedModel", fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True
) -> Any:
    """Refuse a conversion before it has changed half of the model."""
    for weight in self.endor.weights.values():
        refuse_conversion(fn, weight.dtype, weight.device)
        break
    return type(self)._apply(self, fn, recurse)


def read_config(path: Path) -> dict[str, Any]:
    """Return a checkpoint's config.json.

    Raises:
        ConfigError: There is none, or it is no JSON object.
    """
    file = path / "config.json"
    if not file.exists():
        raise ConfigError(f"{file}: not found; pass the directory of a checkpoint")
    return read_object(file, error=ConfigError, lenient=True)


def refuse_quantized(section: Any) -> None:
    """Raise unless packed weights are what a model multiplies by.

    Args:
        section: The `quantization_config` of a packed checkpoint.

    Raises:
        ConfigError: They were quantized before they were packed, and need their scales.
    """
    method = source_quantization(section)
    if method is not None:
        raise ConfigError(
            f"quantization_config: the weights were quantized ({method}) before they were packed, "
            "and need their scales to be run: `endor unpack` the checkpoint and load the result"
        )


def is_packed(path: Path) -> bool:
    """Whether `path` is the directory of a packed checkpoint, by its config.

    Raises:
        ConfigError: It holds no config.
    """
    section = read_config(path).get("quantization_config")
    return isinstance(section, dict) and section.get("quant_method") == "endor"
