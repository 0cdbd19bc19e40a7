"""Products with a weight that is stored transposed: inputs that are zero cost nothing.

In a feed-forward block whose activation is exactly zero for most neurons, the second matrix
multiplies mostly zeros. Stored transposed, what belongs to one neuron lies together, and the
product reads that of the others only (as PowerInfer does, arXiv 2312.12456).
"""

import ctypes

import numpy as np

from endor import codecs
from endor.codecs import DType, Encoded
from endor.errors import DTypeError, ShapeError
from endor.kernels import bundles, native


def active_neurons(x: np.ndarray) -> np.ndarray:
    """Return the columns of `x` that hold any number but 0, ascending, u32.

    Args:
        x: `(batch, cols)`: float32, or the bits of a float type, unsigned; -0.0 is a zero.
    """
    bits = x.view(np.uint32) if x.dtype == np.float32 else x
    library, _ = native.load()
    if library is not None and bits.itemsize in (2, 4) and bits.flags.c_contiguous:
        out = np.empty(bits.shape[1] + 1, dtype=np.uint32)
        count = library.endor_active(
            *(bits.ctypes.data, *bits.shape, bits.itemsize, out.ctypes.data)
        )
        return out[:count]
    if not len(bits):
        return np.zeros(0, dtype=np.uint32)
    seen = bits[0] if len(bits) == 1 else np.bitwise_or.reduce(bits, axis=0)
    return np.flatnonzero(seen << seen.dtype.type(1)).astype(np.uint32)


def product(
    encoded: Encoded,
    x: np.ndarray,
    active: np.ndarray,
    out: np.ndarray,
    threads: int,
    number: int | None,
) -> np.ndarray:
    """Write `x @ W.T` to `out` and return it, W being stored transposed.

    One float32 sum an element, in the order of the columns of W, for any number of threads. An
    input that is 0 adds nothing, also where W is infinite or NaN.

    Args:
        encoded: W, of shape `(rows, cols)`: its arrays hold `(cols, rows)`.
        x: `(batch, cols)`, C-contiguous: float32, or bits of W's type.
        active: From `active_neurons`; of the other columns of W not a byte is read.
        out: float32 `(batch, rows)`, C-contiguous.
        threads: As everywhere in `endor.kernels`.
        number: Of the kernel; None is numpy.

    Raises:
        FormatError: The arrays contradict each other.
    """
    spec = encoded.spec
    rows, cols = spec.shape
    assert spec.transposed
    assert (x.shape[1], out.shape) == (cols, (len(x), rows))
    h = np.ascontiguousarray(floats(x[:, active], spec.dtype))
    if number is None:
        np.matmul(h, floats(_rows(encoded, active), spec.dtype), out=out)
        return out
    if spec.bundles is not None:
        made = bundles.view(encoded)
        status = native.library().endor_bundles_neurons(
            *(number, ctypes.byref(made), native.WEIGHT_KINDS[spec.dtype.name]),
            *(active.ctypes.data, active.size, h.ctypes.data, len(x), out.ctypes.data, threads),
        )
        native.check(status)
        return out
    view = native.view(encoded)
    status = native.library().endor_neurons(
        *(number, ctypes.byref(view), native.WEIGHT_KINDS[spec.dtype.name]),
        *(cols, rows, active.ctypes.data, active.size, h.ctypes.data, len(x)),
        *(out.ctypes.data, threads),
    )
    native.check(status)
    return out


def _rows(encoded: Encoded, active: np.ndarray) -> np.ndarray:
    """Return rows of the stored matrix; of bundles, those that hold no such row are not read."""
    spec = encoded.spec
    if spec.bundles is None:
        whole: np.ndarray = codecs.decode(Encoded(spec.stored, encoded.arrays))[active]
        return whole
    out = np.empty((active.size, spec.shape[0]), dtype=spec.dtype.uint)
    index = active // spec.bundles.rows
    for one in np.unique(index).tolist():
        part = codecs.bundled.part(encoded, one)
        here = np.flatnonzero(index == one)
        out[here] = codecs.decode(part)[active[here] % spec.bundles.rows]
    return out


def turn(
    stored: np.ndarray, out: np.ndarray, first: int, last: int, threads: int, number: int | None
) -> None:
    """Write columns `[first, last)` of `stored`, unsigned `(rows, cols)`, to `out` as its rows.

    Raises:
        ShapeError: `out` has another size, or one of the two is not contiguous.
        DTypeError: They have different element types.
    """
    rows, cols = stored.shape
    if out.size != rows * (last - first) or not (
        out.flags.c_contiguous and stored.flags.c_contiguous
    ):
        raise ShapeError(f"out must be {rows * (last - first)} contiguous elements, got {out.size}")
    if out.dtype != stored.dtype:
        raise DTypeError(f"out must be {stored.dtype}, got {out.dtype}")
    if number is None:
        out.reshape(last - first, rows)[...] = stored[:, first:last].T
        return
    native.library().endor_turn(
        *(stored.ctypes.data, out.ctypes.data, rows, cols),
        *(first, last, stored.itemsize, threads),
    )


def floats(bits: np.ndarray, dtype: DType) -> np.ndarray:
    """Return `bits` of `dtype`, or float32 as it is, as float32."""
    if bits.dtype == np.float32 or dtype.name == "F32":
        return bits.view(np.float32)
    if dtype.name == "F16":
        return bits.view(np.float16).astype(np.float32)
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)
