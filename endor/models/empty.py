"""A transformers model without weights: its class, and its parameters on the meta device."""

from pathlib import Path
from typing import Any

import torch

from endor.trust import one_line_errors


def empty_model(
    maker: Any,
    config: Any,
    path: Path,
    *,
    dtype: torch.dtype | None = None,
    computed_buffers: bool = False,
    trust_remote_code: bool = False,
) -> Any:
    """Return a model whose parameters are on the meta device.

    Args:
        maker: A model class, or one of transformers' automatic classes.
        config: Its config; what it says of a quantisation is dropped.
        path: The checkpoint, for messages.
        dtype: Of the parameters; the config's own when None.
        computed_buffers: Have the buffers that the model computes (rotary tables) in memory.
        trust_remote_code: Run Python code that comes with the checkpoint.

    Raises:
        ConfigError: transformers makes no model of the config.
    """
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    options: dict[str, Any] = {} if dtype is None else {"dtype": dtype}
    build = getattr(maker, "_from_config", None)
    if build is None:
        build, options["trust_remote_code"] = maker.from_config, trust_remote_code
    with one_line_errors(path, "no model can be made of its config.json"):
        if not computed_buffers:
            with torch.device("meta"):
                return build(config, **options)
        from accelerate import init_empty_weights

        with init_empty_weights(include_buffers=False):
            return build(config, **options)


def model_class(config: Any, *, trust_remote_code: bool = False) -> Any:
    """Return the class that a config names, or the automatic one for causal language models.

    A name that is no model class of transformers is left to the automatic classes. Where a
    checkpoint's code is trusted, so is one that the code is for: the class that the checkpoint
    was saved from, if the code has it.
    """
    import transformers

    own = getattr(config, "auto_map", None)
    own = own if isinstance(own, dict) and trust_remote_code else {}
    names = getattr(config, "architectures", None)
    names = names if isinstance(names, list | tuple) else ()
    for name in names if not own else ():
        found = getattr(transformers, name, None) if isinstance(name, str) else None
        if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel):
            return found
    doors = [
        (name, str(target).rpartition(".")[2])
        for name, target in own.items()
        if name.startswith("AutoModel") and hasattr(transformers, name)
    ]
    named = [name for name, target in doors if target in names] or [name for name, _ in doors]
    usual = transformers.AutoModelForCausalLM.__name__
    return getattr(transformers, usual if usual in named or not named else named[0])
