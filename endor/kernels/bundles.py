"""Matrices in bundles: packed and expanded; products with them are in `endor.kernels.neurons`."""

import ctypes
from dataclasses import replace

import numpy as np

from endor.codecs import Encoded, TensorSpec, bundled
from endor.codecs.bundles import UNIT
from endor.errors import ShapeError
from endor.kernels import native


class View(ctypes.Structure):
    """`endor_bundles` of csrc/bundles.h, field by field."""

    _fields_ = (
        ("form", native.Tensor),
        ("rows", ctypes.c_uint64),
        ("cols", ctypes.c_uint64),
        ("bundle_rows", ctypes.c_uint64),
        ("units", ctypes.c_uint64),
        ("offsets", ctypes.c_void_p),
        ("data", ctypes.c_void_p),
        ("bitmap", ctypes.c_int32),
        ("reserved", ctypes.c_int32),
    )


def view(encoded: Encoded) -> View:
    """Return the library's view of a matrix in bundles, kept as long as it holds the same arrays.

    Raises:
        ShapeError: An array is missing, or is not what the spec promises.
    """
    arrays, spec = encoded.arrays, encoded.spec

    def make() -> View:
        return _view(spec, arrays["bundle_offsets"], arrays["bundles"])

    return native.kept_view(encoded, make)


def encode(
    bits: np.ndarray, form: TensorSpec, rows: int, threads: int, number: int | None
) -> Encoded:
    """Return the matrix whose transposed one is `bits`, in bundles of `rows` of its rows.

    Args:
        bits: Unsigned `(neurons, hidden)`, contiguous.
        form: Codec, bitmap and window, of codec `raw` or `exp`.
        rows: Of a bundle.
        threads: As everywhere in `endor.kernels`.
        number: Of the kernel; None is numpy.

    Raises:
        ShapeError: The bundles would take more than the format can say.
        MemoryError: No memory for the bookkeeping.
    """
    if number is None:
        return bundled.encode(bits, form, rows)
    library = native.library()
    count = -(-bits.shape[0] // rows)
    counts = np.zeros((count, 2), dtype="<u4")
    offsets = np.zeros(count + 1, dtype="<u4")
    stored = replace(form, shape=bits.shape, transposed=False, bundles=None, nnz=bits.size)
    spec = bundled.bundled_spec(stored, rows, 0)
    made = _view(spec, offsets, np.zeros(0, np.uint8))
    address = bits.ctypes.data
    if library.endor_bundles_count(ctypes.byref(made), address, counts.ctypes.data, threads):
        raise ShapeError(f"a matrix of shape {spec.shape} is too large for bundles")
    data = np.zeros(UNIT * int(offsets[-1]), dtype=np.uint8)
    made.data, made.units = data.ctypes.data, int(offsets[-1])
    status = library.endor_bundles_pack(
        number, ctypes.byref(made), address, counts.ctypes.data, threads
    )
    native.check(status)
    nnz, patches = counts.sum(axis=0, dtype=np.int64).tolist()
    stored = replace(stored, nnz=nnz, patches=patches)
    spec = bundled.bundled_spec(stored, rows, data.size)
    return Encoded(spec, {"bundle_offsets": offsets, "bundles": data})


def decode(encoded: Encoded, threads: int, number: int | None) -> np.ndarray:
    """Return the stored matrix, unsigned `(neurons, hidden)`.

    Raises:
        FormatError: The arrays contradict each other.
    """
    spec = encoded.spec
    if number is None:
        return bundled.decode(encoded).reshape(spec.shape[::-1])
    out = np.empty(spec.shape[::-1], dtype=spec.dtype.uint)
    library, made = native.library(), view(encoded)
    status = library.endor_bundles_decode(number, ctypes.byref(made), out.ctypes.data, threads)
    native.check(status)
    return out


def _view(spec: TensorSpec, offsets: np.ndarray, data: np.ndarray) -> View:
    assert spec.bundles is not None
    rows = spec.shape[1]
    if (
        offsets.dtype != np.dtype("<u4")
        or offsets.shape != (spec.bundles.count(rows) + 1,)
        or data.dtype != np.uint8
        or not (offsets.flags.c_contiguous and data.flags.c_contiguous)
    ):
        raise ShapeError(f"bundles of a matrix {spec.shape} have other arrays")
    return View(
        form=native.element_form(spec),
        rows=rows,
        cols=spec.shape[0],
        bundle_rows=spec.bundles.rows,
        units=data.size // UNIT,
        offsets=offsets.ctypes.data,
        data=data.ctypes.data,
        bitmap=int(spec.bitmap),
    )
