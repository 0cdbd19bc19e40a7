"""One tensor to stored arrays and back: the numpy reference of every codec.

Works on unsigned-integer views of the elements, so every bit pattern survives. The fast kernels in
`endor.kernels` give the same bytes.
"""

from typing import cast

import numpy as np

from endor.codecs import bundled, dense, exp, fields, integer, raw
from endor.codecs.choice import Plan, choose
from endor.codecs.dtypes import DTYPES, DType, dtype
from endor.codecs.spec import (
    CODECS,
    GROUP,
    TILE,
    ArraySpec,
    Codec,
    CodecChoice,
    Encoded,
    TensorSpec,
)
from endor.codecs.validate import validate
from endor.errors import DTypeError, ShapeError

__all__ = [
    "CODECS",
    "DTYPES",
    "GROUP",
    "TILE",
    "ArraySpec",
    "Codec",
    "CodecChoice",
    "DType",
    "Encoded",
    "Plan",
    "TensorSpec",
    "bundled",
    "check_bits",
    "choose",
    "decode",
    "dtype",
    "encode",
    "fields",
    "integer",
    "validate",
]


def check_bits(bits: np.ndarray, dtype: DType, shape: tuple[int, ...] | None) -> np.ndarray:
    """Return `bits` as a C-contiguous unsigned array of `shape`.

    Raises:
        DTypeError: `bits` is not in the unsigned type of `dtype`.
        ShapeError: `shape` has another number of elements.
    """
    if bits.dtype != dtype.uint:
        raise DTypeError(f"{dtype.name} elements must come as {dtype.uint}, got {bits.dtype}")
    if shape is not None:
        if int(np.prod(shape, dtype=np.int64)) != bits.size:
            raise ShapeError(f"shape {shape} does not hold {bits.size} elements")
        bits = bits.reshape(shape)
    return bits if bits.flags.c_contiguous else np.ascontiguousarray(bits)


def encode(
    bits: np.ndarray,
    dtype: DType,
    *,
    shape: tuple[int, ...] | None = None,
    codec: CodecChoice = "auto",
    bitmap: bool | None = None,
) -> Encoded:
    """Return `bits` in stored form.

    Args:
        bits: Elements as unsigned integers of `dtype`'s width, any shape.
        dtype: Element type.
        shape: Dense shape, when `bits` is flat.
        codec: `"auto"` takes whatever needs the fewest bytes.
        bitmap: Force a bitmap on or off; None leaves it to the size.

    Raises:
        DTypeError: `bits` has the wrong element type.
        ShapeError: `shape` does not match.
        ConfigError: The forced codec does not apply.
    """
    bits = check_bits(bits, dtype, shape)
    nnz, histogram = 0, np.zeros(256, dtype=np.int64)
    if dtype.packable:
        stored = bits[bits != 0]
        nnz = int(stored.size)
        histogram = np.bincount(dtype.exponents(stored).reshape(-1), minlength=256)
    plan = choose(bits.size, dtype, nnz, histogram, codec=codec, bitmap=bitmap)
    if plan.codec == "dense":
        return dense.encode(bits, dtype)
    if plan.codec == "raw":
        return raw.encode(bits, dtype)
    return exp.encode(bits, dtype, bitmap=plan.bitmap, k=plan.k, base=plan.base)


def decode(encoded: Encoded, out: np.ndarray | None = None) -> np.ndarray:
    """Return the dense elements, unsigned, of the tensor's shape; `encoded` must be valid.

    Args:
        encoded: A stored tensor that came from `encode` or passed `validate`.
        out: Written and returned when given: flat or of the tensor's shape, unsigned.

    Raises:
        ShapeError: `out` has another size or element type.
    """
    spec = encoded.spec
    module = {"dense": dense, "raw": raw, "exp": exp, "int": integer, "fields": fields}[spec.codec]
    flat = cast(np.ndarray, (bundled if spec.bundles else module).decode(encoded))
    if spec.transposed:
        flat = np.ascontiguousarray(flat.reshape(spec.shape[::-1]).T)
    if out is None:
        return flat.reshape(spec.dtype.unit_shape(spec.shape))
    if out.size != spec.units or out.dtype != spec.dtype.uint:
        raise ShapeError(
            f"out must hold {spec.units} of {spec.dtype.uint}, got {out.size} of {out.dtype}"
        )
    out[...] = flat.reshape(out.shape)
    return out
