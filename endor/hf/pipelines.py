"""Pipelines that are told the device where a packed model is already."""

import functools
from typing import Any

import torch

from endor.dependencies import require
from endor.hf.after_import import AfterImport


def allow_own_device(pipelines: Any) -> None:
    """Have a pipeline take the only device of a packed model as its `device`; twice is no harm.

    transformers refuses any device for a model that has a device map, and without a map it moves
    the model to the first accelerator. Other devices it still refuses.

    Args:
        pipelines: The module `transformers.pipelines.base`.

    Raises:
        DependencyError: It has no `Pipeline`.
    """
    require("transformers", pipelines, ["Pipeline"])
    init = pipelines.Pipeline.__init__
    if hasattr(init, "_endor"):
        return

    @functools.wraps(init)
    def guarded(self: Any, model: Any, *args: Any, device: Any = None, **kwargs: Any) -> None:
        if hasattr(model, "endor") and _is_own(model, device):
            device = None
        init(self, model, *args, device=device, **kwargs)

    guarded._endor = True  # type: ignore[attr-defined]
    pipelines.Pipeline.__init__ = guarded


def _is_own(model: Any, device: Any) -> bool:
    """Whether all of a packed model is on `device`, written as pipelines take it."""
    devices = {torch.device(each) for each in model.hf_device_map.values()}
    if len(devices) != 1 or device is None or isinstance(device, bool):
        return False
    (own,) = devices
    if isinstance(device, int):
        return device == (-1 if own.type == "cpu" else own.index or 0)
    try:
        wanted = torch.device(device)
    except (RuntimeError, TypeError):
        return False  # transformers says what is wrong with it
    return wanted.type == own.type and (
        own.type == "cpu" or (wanted.index or 0) == (own.index or 0)
    )


watch = AfterImport("transformers.pipelines.base", allow_own_device)
