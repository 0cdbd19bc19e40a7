"""The cache that `generate` makes: where a model keeps keys and values, and whether it can."""

import inspect
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers.cache_utils import Cache, DynamicCache, DynamicLayer
from transformers.utils import ModelOutput

from endor.dependencies import changed
from endor.errors import ConfigError
from endor.hf.cache import EndorCache
from endor.hf.model import OwnedMethod
from endor.offload.device import CudaDevice, Device
from endor.offload.device_mover import DeviceMover
from endor.offload.kv.media import FileAccess
from endor.offload.kv.store import KVStore
from endor.offload.store import Store
from endor.planning.kv import KVSetting, check_kv

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CACHE_ARGUMENT = "cache" if hasattr(ModelOutput, "past_key_values") else "past_key_values"
"""What transformers calls a cache among the arguments and results of a model."""

_HOOK = "_prepare_cache_for_generation"
"""The method of transformers' generation that makes a cache."""

_PLAIN = (None, "dynamic", "dynamic_full")
"""Values of `cache_implementation` for which transformers makes a plain cache."""


def keep_kv(
    model: "PreTrainedModel",
    setting: KVSetting,
    *,
    ram_bytes: int | None = None,
    directory: Path | None = None,
) -> None:
    """Have `model.generate` keep keys and values where `setting` says.

    A cache that is passed to `generate`, another `cache_implementation` and `use_cache=False` are
    used as they are. Otherwise `generate` raises when the cache could not be placed.

    Args:
        model: A model with packed weights.
        setting: `device` or `auto`: transformers' own cache. `ram`: host memory; on the CPU that is
            where transformers keeps them, too. `disk`: a file.
        ram_bytes: With `ram`: layers beyond it go to files.
        directory: For files.

    Raises:
        ConfigError: Another setting, or one that this model, or a model on several devices, does
            not have.
        DependencyError: transformers makes caches in another way than is known here.
    """
    if check_kv(setting) in ("auto", "device"):
        return
    reason = refuse_kv(model)
    if reason is not None:
        raise ConfigError(f"kv={setting!r}: {reason}; load it with kv='device'")
    if not any(_HOOK in _names_used(base) for base in type(model).__mro__):
        raise changed("transformers", f"generate does not call {_HOOK}")
    limit = 0 if setting == "disk" else ram_bytes
    prepare = partial(_prepare_cache, setting, limit, FileAccess(directory))
    setattr(model, _HOOK, OwnedMethod(prepare, model))


def refuse_kv(model: "PreTrainedModel") -> str | None:
    """Return why a model's keys and values can only be where it computes, None when they need not.

    Asked before weights are loaded, too: nothing of the model's store is used but its kind.
    """
    if len(getattr(getattr(model, "endor", None), "shares", ())) > 1:
        return "the model is on several devices, each of which keeps what its layers need"
    if not hasattr(model, "can_generate") or not model.can_generate():
        return f"{type(model).__name__} does not generate"
    if model.config.is_encoder_decoder:
        return f"{type(model).__name__} has an encoder, whose keys and values are kept with it"
    config = model.config.get_text_config(decoder=True)
    if not hasattr(config, "num_hidden_layers"):
        return f"{type(model).__name__} does not say how many layers it has"
    try:
        layers: list[Any] = DynamicCache(config=config).layers
    except Exception as error:  # a config of another kind than transformers' own cache knows
        return f"transformers makes no cache for {type(model).__name__} ({error!r})"
    if not any(type(layer) is DynamicLayer for layer in layers):
        return (
            f"{type(model).__name__} has no layer that keeps all tokens (their windows, or states, "
            "do not grow)"
        )
    return None


def new_cache(
    model: "PreTrainedModel",
    *,
    ram_bytes: int | None = None,
    access: FileAccess | None = None,
    whole: bool = False,
) -> EndorCache:
    """Return an empty cache for a model with packed weights, on its mover's threads.

    Args:
        model: The model.
        ram_bytes: Host memory; layers beyond it go to files. None sets no limit.
        access: How files are made.
        whole: As for `EndorCache`.
    """
    weights: Store = model.endor
    device: Device | None = None
    (mover,) = weights.movers
    if isinstance(mover, DeviceMover):
        device = mover.device
        if isinstance(device, CudaDevice):
            device = CudaDevice(device.device)  # a copy stream beside that of the weights
    config = model.config.get_text_config(decoder=True)
    store = KVStore(
        config.num_hidden_layers,
        device=device,
        ram_bytes=ram_bytes,
        post=mover.post,
        ledger=weights.ledger,
        access=access,
    )
    return EndorCache(config, store, whole=whole)


def _prepare_cache(
    setting: KVSetting,
    ram_bytes: int | None,
    access: FileAccess,
    model: "PreTrainedModel",
    generation_config: Any,
    model_kwargs: dict[str, Any],
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Do what transformers does, and put an `EndorCache` where it made a plain one.

    transformers has renamed the argument before (`past_key_values`, `cache_params`, `cache`), so
    the cache is known by what it is, not by its name.

    Raises:
        DependencyError: transformers made none, or one of a kind that is not known here.
    """
    before = {name: value for name, value in model_kwargs.items() if isinstance(value, Cache)}
    out = getattr(type(model), _HOOK)(model, generation_config, model_kwargs, *args, **kwargs)
    implementation = generation_config.cache_implementation
    if before or generation_config.use_cache is False or implementation not in _PLAIN:
        return out
    made = {name: value for name, value in model_kwargs.items() if isinstance(value, Cache)}
    if [type(value) for value in made.values()] != [DynamicCache]:
        kinds = ", ".join(f"{name}={type(value).__name__}" for name, value in made.items())
        raise changed(
            "transformers",
            f"for kv={setting!r}, generate should have made one DynamicCache and made "
            f"{kinds or 'none'}",
        )
    plain = next(iter(made.values()))
    cache = new_cache(model, ram_bytes=ram_bytes, access=access, whole=not plain.layers)
    if generation_config.is_assistant and hasattr(cache, "activate_past_recording"):
        cache.activate_past_recording()
    model_kwargs.update(dict.fromkeys(made, cache))
    return out


def _names_used(base: type) -> tuple[str, ...]:
    """Return the names that a class's own `generate` uses, beneath its decorators."""
    code = getattr(inspect.unwrap(base.__dict__.get("generate", _names_used)), "__code__", None)
    return code.co_names if code is not None else ()
