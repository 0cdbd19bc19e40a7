"""Packed checkpoints in transformers; importing this imports neither torch nor transformers."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from endor.hf.config import Loading
    from endor.hf.experts import EndorExperts
    from endor.hf.linear import EndorLinear
    from endor.hf.load import load_model
    from endor.hf.quantization_config import EndorConfig
    from endor.hf.quantizer import EndorQuantizer

__all__ = ["EndorConfig", "EndorExperts", "EndorLinear", "EndorQuantizer", "Loading", "load_model"]

_HOMES = {
    "EndorConfig": "endor.hf.quantizer",
    "EndorExperts": "endor.hf.experts",
    "EndorLinear": "endor.hf.linear",
    "EndorQuantizer": "endor.hf.quantizer",
    "Loading": "endor.hf.config",
    "load_model": "endor.hf.load",
}


def __getattr__(name: str) -> Any:
    """Import a name on first use."""
    if name not in _HOMES:
        raise AttributeError(f"module 'endor.hf' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value
