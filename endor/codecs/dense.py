"""Codec `dense`: the tensor as it is."""

import math

import numpy as np

from endor.codecs.dtypes import DType
from endor.codecs.spec import Encoded, TensorSpec


def encode(bits: np.ndarray, dtype: DType) -> Encoded:
    """Return `bits` stored as they are."""
    return encode_as(bits, dtype, bits.shape)


def encode_as(bits: np.ndarray, dtype: DType, shape: tuple[int, ...]) -> Encoded:
    """Return `bits`, of `dtype.unit_shape(shape)`, stored as they are as a tensor of `shape`."""
    spec = TensorSpec(shape, dtype, "dense", bitmap=False, nnz=math.prod(shape))
    return Encoded(spec, {"": bits.reshape(dtype.unit_shape(shape))})


def decode(encoded: Encoded) -> np.ndarray:
    """Return the flat elements."""
    return encoded.arrays[""].reshape(-1)
