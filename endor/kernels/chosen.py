"""Products with some rows of a packed matrix: what is not asked for is not read.

The first matrix of a feed-forward block has a row for each neuron. Where it is known which neurons
can be active, the other rows need not be multiplied (PowerInfer, arXiv 2312.12456).
"""

import ctypes

import numpy as np

from endor import codecs
from endor.codecs import Encoded, TensorSpec
from endor.errors import ShapeError
from endor.kernels import native
from endor.kernels.neurons import floats


def takes_rows(spec: TensorSpec) -> bool:
    """Whether `product` applies: a matrix whose rows lie together, and can be begun anywhere."""
    kind = spec.dtype.name in native.WEIGHT_KINDS and len(spec.shape) == 2
    return kind and spec.codec in ("raw", "exp") and not spec.transposed


def product(
    encoded: Encoded,
    x: np.ndarray,
    chosen: np.ndarray,
    out: np.ndarray,
    threads: int,
    number: int | None,
) -> None:
    """Write columns `chosen` of `x @ W.T` to `out`, and nothing else.

    From a compiled kernel each has the bits that `kernels.matvec` gives it: the sum of a row does
    not depend on which others are multiplied.

    Args:
        encoded: W, of shape `(rows, cols)`, stored as `takes_rows` says.
        x: `(batch, cols)`, C-contiguous: float32, or bits of W's type.
        chosen: Rows of W, rising, u32; of the others nothing but tile offsets is read.
        out: float32 `(batch, rows)`, C-contiguous.
        threads: As everywhere in `endor.kernels`.
        number: Of the kernel; None is numpy.

    Raises:
        ShapeError: There is no such row.
        FormatError: The arrays contradict each other.
    """
    spec = encoded.spec
    rows, cols = spec.shape
    assert takes_rows(spec)
    assert chosen.dtype == np.uint32
    assert chosen.flags.c_contiguous
    assert (x.shape[1], out.shape) == (cols, (len(x), rows))
    if chosen.size and int(chosen[-1]) >= rows:
        raise ShapeError(f"chosen must be below {rows} rows, got {chosen[-1]}")
    kind = native.WEIGHT_KINDS[spec.dtype.name]
    if not cols:
        out[:, chosen] = 0
        return
    if number is None:
        weight = floats(codecs.decode(encoded)[chosen], spec.dtype)
        out[:, chosen] = floats(x, spec.dtype) @ weight.T
        return
    view = native.view(encoded)
    status = native.library().endor_matvec_chosen(
        *(number, ctypes.byref(view), kind, rows, cols, chosen.ctypes.data, chosen.size),
        *(x.ctypes.data, native.WEIGHT_KINDS["F32"] if x.dtype == np.float32 else kind, len(x)),
        *(out.ctypes.data, threads),
    )
    native.check(status)
