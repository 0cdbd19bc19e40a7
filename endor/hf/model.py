"""What a transformers model with packed weights does differently from one without."""

import copy
import functools
import inspect
import os
import shutil
import tempfile
import weakref
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from endor.checkpoint.directory import PACKED_INDEX_NAME
from endor.dependencies import require
from endor.errors import ConfigError, OutputExistsError
from endor.hf.packed_layer import refuse_conversion
from endor.offload.store import Store

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from endor.planning.plan import Plan

_MARK = "_is_quantized"
"""What transformers sets in the config of a model that has a quantizer."""


def adopt(
    model: "PreTrainedModel",
    store: Store,
    plan: "Plan | None" = None,
    *,
    save: Callable[..., None] | None = None,
    library: str = "transformers",
) -> None:
    """Give `model` its store, as `model.endor`, its plan, and the methods that need to know.

    Args:
        model: Of transformers, or of diffusers.
        store: Its weights.
        plan: What the planner decided.
        save: Its `save_pretrained`; that of transformers when omitted.
        library: Whose model it is.
    """
    model.endor = store
    model.endor_plan = plan
    model._endor_loaded = _versions(model)
    own: dict[str, Callable[..., Any]] = {
        "save_pretrained": save or save_pretrained,
        "num_parameters": num_parameters,
        "get_memory_footprint": get_memory_footprint,
        "_apply": _apply,
    }
    require(library, type(model), own)
    for name, function in own.items():
        setattr(model, name, OwnedMethod(function, model))


def multiply_as_unquantized(model: torch.nn.Module) -> None:
    """Have modules that compute in another way when weights are quantized compute as without.

    transformers marks the config of every quantized model, and Jamba and FalconMamba then compute
    `linear(x) - bias`, which rounds twice, where they else multiply by the weight. A packed weight
    is the weight. Branches that only choose a dtype stay: they would look for an `nn.Linear`.
    """
    plain: dict[int, Any] = {}
    for module in model.modules():
        config, kind = getattr(module, "config", None), cast(Hashable, type(module))
        if not hasattr(config, _MARK) or not _computes_by_mark(kind):
            continue
        if id(config) not in plain:
            plain[id(config)] = copy.copy(config)
            delattr(plain[id(config)], _MARK)
        module.config = plain[id(config)]


@functools.cache
def _computes_by_mark(kind: Any) -> bool:
    """Whether a method of a class asks for the mark of quantized models, not for a dtype alone."""
    for base in kind.__mro__:
        for function in vars(base).values():
            code = (
                getattr(inspect.unwrap(function), "__code__", None) if callable(function) else None
            )
            if code and _MARK in code.co_consts and "target_dtype" not in code.co_varnames:
                return True
    return False


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


def num_parameters(
    self: "PreTrainedModel", only_trainable: bool = False, exclude_embeddings: bool = False
) -> int:
    """Return the number of parameters, the packed ones included (they are not trainable)."""
    unpacked: int = type(self).num_parameters(self, only_trainable, exclude_embeddings)
    return unpacked if only_trainable else unpacked + self.endor.numel


def get_memory_footprint(self: "PreTrainedModel", return_buffers: bool = True) -> int:
    """Return the bytes of memory that the weights take: unpacked, packed, staging and scratch."""
    unpacked: int = type(self).get_memory_footprint(self, return_buffers)
    return unpacked + int(self.endor.held_nbytes) + int(self.endor.scratch_nbytes)


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
    refuse_changed(self)
    if not is_main_process:
        return
    target = Path(save_directory)
    if (target / PACKED_INDEX_NAME).exists():
        raise OutputExistsError(f"{target}: holds a packed checkpoint; choose another directory")
    target.mkdir(parents=True, exist_ok=True)
    sources = [layout.path for layout in self.endor.layouts]
    for source in sources:
        copy_whole(source, target / source.name)
    self.config.architectures = [type(self).__name__]
    self.config.save_pretrained(target)
    if self.can_generate():
        self.generation_config.save_pretrained(target)
    copy_whole(sources[0].parent / PACKED_INDEX_NAME, target / PACKED_INDEX_NAME)


def refuse_changed(model: "PreTrainedModel") -> None:
    """Raise `ConfigError` if a parameter was changed since the model was loaded."""
    changed = sorted(_versions(model).items() ^ model._endor_loaded.items())
    if changed:
        raise ConfigError(
            f"{changed[0][0]}: changed since the model was loaded, and save_pretrained only copies "
            "the packed checkpoint; unpack it to save changed weights"
        )


def copy_whole(source: Path, target: Path) -> None:
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
