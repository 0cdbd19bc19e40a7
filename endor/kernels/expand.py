"""Stored tensors become dense elements, with the kernel of their codec."""

import ctypes

import numpy as np

from endor import codecs
from endor.codecs import Encoded
from endor.errors import DTypeError, ShapeError
from endor.kernels import bundles, fields, integer, native, neurons
from endor.kernels.dispatch import select, thread_count


def decode(
    encoded: Encoded,
    out: np.ndarray,
    *,
    start: int = 0,
    stop: int | None = None,
    threads: int | None = None,
    streaming: bool | None = None,
    kernel: str | None = None,
) -> np.ndarray:
    """Write the dense elements `[start, stop)`, in row-major order, to `out` and return it.

    Sizes and types are checked here, contents by `codecs.validate`, which whoever reads a file
    calls once before. Whatever the contents, nothing outside `out[: stop - start]` is written and
    nothing outside the arrays is read.

    Args:
        encoded: A stored tensor.
        out: Flat, contiguous, unsigned of the element width, `stop - start` long or more.
        start: First element, of any alignment.
        stop: One past the last; the tensor's end when omitted.
        streaming: Store past the caches; None does so for more than 16 MiB. Best when nothing
            reads `out` soon.

    Raises:
        ShapeError: `out` is too short, not flat or not contiguous, or the range leaves the tensor.
        DTypeError: `out` has another element type.
        FormatError: The arrays contradict each other.
        BackendError: The forced kernel cannot run here.
    """
    spec, number, count = encoded.spec, select(kernel), thread_count(threads)
    stop = spec.units if stop is None else stop
    if not 0 <= start <= stop <= spec.units:
        raise ShapeError(f"range [{start}, {stop}) must lie in [0, {spec.units})")
    if out.dtype != spec.dtype.uint:
        raise DTypeError(f"out must be {spec.dtype.uint} for {spec.dtype.name}, got {out.dtype}")
    if out.ndim != 1 or not out.flags.c_contiguous or not out.flags.writeable:
        raise ShapeError("out must be flat, contiguous and writable")
    if out.size < stop - start:
        raise ShapeError(f"out must hold {stop - start} elements, got {out.size}")
    if spec.codec == "dense":
        out[: stop - start] = encoded.arrays[""].reshape(-1)[start:stop]
    elif spec.codec == "fields":
        size = spec.dtype.itemsize
        raw = out[: stop - start].view(np.uint8)
        fields.decode(encoded, raw, start * size, count, number)
    elif spec.transposed:
        _decode_turned(encoded, out[: stop - start], start, count, kernel)
    elif number is None:
        out[: stop - start] = codecs.decode(encoded).reshape(-1)[start:stop]
    elif spec.codec == "int":
        integer.decode(encoded, out, start, stop, count, streaming, number)
    else:
        library, view = native.library(), native.view(encoded)
        if streaming is None:
            streaming = (stop - start) * spec.dtype.itemsize > native.STREAMING_NBYTES
        status = library.endor_decode(
            number, ctypes.byref(view), out.ctypes.data, start, stop, count, int(streaming)
        )
        native.check(status)
    return out


def _decode_turned(
    encoded: Encoded, out: np.ndarray, start: int, threads: int, kernel: str | None
) -> None:
    """Write elements of a matrix that is stored transposed, which is decoded whole beside."""
    spec, number = encoded.spec.stored, select(kernel)
    rows = spec.shape[0]
    if encoded.spec.bundles is not None:
        stored = bundles.decode(encoded, threads, number)
    else:
        stored, turned = np.empty(spec.shape, dtype=spec.dtype.uint), Encoded(spec, encoded.arrays)
        decode(turned, stored.reshape(-1), threads=threads, streaming=False, kernel=kernel)
    if not out.size:
        return
    first, last = start // rows, -(-(start + out.size) // rows)
    exact = (start, out.size) == (first * rows, (last - first) * rows)
    whole = out if exact else np.empty((last - first) * rows, dtype=out.dtype)
    neurons.turn(stored, whole, first, last, threads, number)
    if not exact:
        out[...] = whole[start - first * rows :][: out.size]
