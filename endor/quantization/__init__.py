"""Quantisation: weights as integers times steps, at any number of bits once entropy-coded.

Modules (who needs what):
- contract   QuantizeOptions; no torch
- ecq        one matrix and the statistics of its inputs, to codes at any scale
- rates      bits for the matrices of a layer, so that the last one buys the same in each
- timing     how long it takes here
- quantizer  the scale of each matrix, so that all together take the bits asked for
- source     a checkpoint that hands out codes, calibrated or not
- search     the bits that a wanted nearness to the dense model's predictions takes

Rounding without calibration is in `endor.codecs.rounding`: it needs neither torch nor a model.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from endor.quantization.contract import QuantizeOptions

if TYPE_CHECKING:
    from endor.quantization.ecq import Ecq
    from endor.quantization.source import QuantizedSource, RoundedSource

__all__ = ["Ecq", "QuantizeOptions", "QuantizedSource", "RoundedSource"]

_HOMES = {
    "Ecq": "endor.quantization.ecq",
    "QuantizedSource": "endor.quantization.source",
    "RoundedSource": "endor.quantization.source",
}


def __getattr__(name: str) -> Any:
    """Import on first use what needs torch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'endor.quantization' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
