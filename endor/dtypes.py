"""The one table of element types: what torch calls what safetensors calls otherwise."""

from typing import TYPE_CHECKING

from endor import codecs
from endor.codecs import DType
from endor.errors import DTypeError

if TYPE_CHECKING:
    import torch

TORCH_NAMES = {
    "bfloat16": "BF16",
    "float16": "F16",
    "float32": "F32",
    "float64": "F64",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "float8_e8m0fnu": "F8_E8M0",
    "float8_e4m3fnuz": "F8_E4M3FNUZ",
    "float8_e5m2fnuz": "F8_E5M2FNUZ",
    "float4_e2m1fn_x2": "F4",
    "int8": "I8",
    "uint8": "U8",
    "int16": "I16",
    "uint16": "U16",
    "int32": "I32",
    "uint32": "U32",
    "int64": "I64",
    "uint64": "U64",
    "bool": "BOOL",
    "complex64": "C64",
}
"""Safetensors code of each torch dtype, by its name in torch."""


def torch_dtype(dtype: DType) -> "torch.dtype":
    """Return torch's name for an element type."""
    for candidate, name in _names().items():
        if name == dtype.name:
            return candidate
    raise DTypeError(f"this torch has no dtype for {dtype.name}")


def endor_dtype(dtype: "torch.dtype") -> DType:
    """Return the element type of a torch dtype.

    Raises:
        DTypeError: safetensors has no code for it.
    """
    name = _names().get(dtype)
    if name is None:
        raise DTypeError(f"{dtype} has no safetensors code and cannot be stored")
    return codecs.dtype(name)


def _names() -> dict["torch.dtype", str]:
    if not _NAMES:
        import torch

        _NAMES.update({getattr(torch, k): v for k, v in TORCH_NAMES.items() if hasattr(torch, k)})
    return _NAMES


_NAMES: dict["torch.dtype", str] = {}
