"""Codec `dense`: the tensor as it is."""

import numpy as np

from endor.codecs.dtypes import DType
from endor.codecs.spec import Encoded, TensorSpec


def encode(bits: np.ndarray, dtype: DType) -> Encoded:
    """Return `bits` stored as they are."""
    spec = TensorSpec(bits.shape, dtype, "dense", bitmap=False, nnz=bits.size)
    return Encoded(spec, {"": bits})


def decode(encoded: Encoded) -> np.ndarray:
    """Return the flat elements."""
    return encoded.arrays[""].reshape(-1)
