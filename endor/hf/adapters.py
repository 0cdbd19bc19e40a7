"""PEFT on packed weights: a layer like any other, but merging is refused before it begins.

A merge would write to a copy of a packed weight. `PackedWeight` refuses that write, but a model
whose other layers were merged first, or a tuner that notes the merge before it writes, would be
left half merged. So PEFT's two checks before a merge are asked to look for packed layers.
"""

import functools
import sys
from collections.abc import Callable
from typing import Any

from torch import nn

from endor.dependencies import changed, require
from endor.hf.after_import import AfterImport
from endor.hf.packed_layer import PackedLayer, refuse_write

CHECKS = "peft.tuners.tuners_utils"
_LAYER_CHECK = "check_adapters_to_merge"
_MODEL_CHECK = "_check_merge_allowed"


def guard(checks: Any) -> None:
    """Put the question for packed layers before PEFT's checks; twice is no harm.

    Args:
        checks: The module `peft.tuners.tuners_utils`.

    Raises:
        DependencyError: It has no such checks, or they are not what its layers call.
    """
    require("peft", checks, ["BaseTuner", "BaseTunerLayer", _LAYER_CHECK])
    require("peft", checks.BaseTuner, [_MODEL_CHECK])
    require("peft", checks.BaseTunerLayer, ["get_base_layer"])
    layer_check, model_check = getattr(checks, _LAYER_CHECK), checks.BaseTuner._check_merge_allowed
    if not _is_ours(model_check):
        checks.BaseTuner._check_merge_allowed = _before(
            model_check, lambda tuner: _refuse_packed(tuner.model)
        )
    if not _is_ours(layer_check):
        ours = _before(layer_check, lambda layer, *_, **__: _refuse_packed(layer.get_base_layer()))
        # The modules of tuners hold the function by its name.
        for name, module in list(sys.modules.items()):
            if name.startswith("peft.") and vars(module).get(_LAYER_CHECK) is layer_check:
                setattr(module, _LAYER_CHECK, ours)
        if getattr(checks, _LAYER_CHECK) is not ours:
            raise changed("peft", f"{CHECKS}.{_LAYER_CHECK} could not be replaced")


def _before(check: Callable[..., Any], look: Callable[..., None]) -> Callable[..., Any]:
    @functools.wraps(check)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        look(*args, **kwargs)
        return check(*args, **kwargs)

    guarded._endor = True  # type: ignore[attr-defined]
    return guarded


def _is_ours(check: Any) -> bool:
    return getattr(check, "_endor", False)


def _refuse_packed(model: nn.Module) -> None:
    """Raise when `model` is a packed layer, or holds one that PEFT adapted."""
    if isinstance(model, PackedLayer) or any(
        isinstance(getattr(module, "base_layer", None), PackedLayer) for module in model.modules()
    ):
        refuse_write()


watch = AfterImport(CHECKS, guard)
