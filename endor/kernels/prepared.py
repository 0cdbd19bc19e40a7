"""Kernels chosen once for a tensor that is expanded, or multiplied by, again and again."""

import ctypes
from typing import Any

import numpy as np

from endor.codecs import Encoded, TensorSpec
from endor.errors import DTypeError, ShapeError
from endor.kernels import native
from endor.kernels.dispatch import select, thread_count
from endor.kernels.expand import decode

_Seen = tuple[Encoded, Any]


class Prepared:
    """`decode` and `matvec` of one stored tensor, with whatever its form decides found beforehand.

    A model of many small matrices spends more time on that than on some products. The tensor's
    arrays may be others at each call, as they are for a record that is read again.

    Args:
        spec: The tensor's form.
        threads: As everywhere here.
        kernel: As everywhere here.

    Attributes:
        spec: The tensor's form.
        multiplies: Whether `matvec` applies: a `(rows, cols)` matrix, of a type that products
            take, stored by row, with a compiled kernel.

    Raises:
        BackendError: The forced kernel cannot run here.
    """

    __slots__ = (
        "_arrays",
        "_decode",
        "_form",
        "_head",
        "_kernel",
        "_kind",
        "_multiply",
        "_multiply_rows",
        "_number",
        "_seen",
        "_tail",
        "_threads",
        "multiplies",
        "spec",
    )

    def __init__(
        self, spec: TensorSpec, *, threads: int | None = None, kernel: str | None = None
    ) -> None:
        number = select(kernel)
        self.spec = spec
        self.multiplies = False
        self._kernel = kernel
        self._number = number
        self._threads = thread_count(threads)
        self._seen: _Seen | None = None
        self._decode = None
        if number is None or spec.transposed or spec.codec in ("dense", "fields"):
            return
        library, coded = native.library(), spec.codec == "int"
        self._form = native.form(spec)
        self._arrays = [
            (each.suffix, each.suffix or "values", each.nbytes, each.dtype.itemsize)
            for each in spec.arrays
        ]
        self._decode = library.endor_int_decode if coded else library.endor_decode
        self._tail = (0, self._threads) if coded else (self._threads,)
        kind = native.WEIGHT_KINDS.get(spec.dtype.name)
        if kind is not None and len(spec.shape) == 2:
            self.multiplies = True
            self._multiply = library.endor_int_matvec if coded else library.endor_matvec
            self._multiply_rows = (
                library.endor_int_matvec_rows if coded else library.endor_matvec_rows
            )
            self._kind = kind
            self._head = spec.shape if coded else (kind, *spec.shape)

    def decode(
        self, encoded: Encoded, out: np.ndarray, *, start: int = 0, stop: int | None = None
    ) -> None:
        """Write the dense elements `[start, stop)` to `out`; as `endor.kernels.decode`."""
        spec = self.spec
        stop = spec.units if stop is None else stop
        if self._decode is None:
            decode(encoded, out, start=start, stop=stop, threads=self._threads, kernel=self._kernel)
            return
        if not 0 <= start <= stop <= spec.units or out.size < stop - start:
            raise ShapeError(f"[{start}, {stop}) must lie in [0, {spec.units}), and fit in `out`")
        if out.dtype != spec.dtype.uint or not (out.flags.c_contiguous and out.flags.writeable):
            raise DTypeError(f"out must be {spec.dtype.uint}, contiguous and writable")
        streaming = (stop - start) * spec.dtype.itemsize > native.STREAMING_NBYTES
        view = self._view(encoded)
        where = out.ctypes.data, start, stop
        status = self._decode(self._number, view, *where, *self._tail, int(streaming))
        if status:
            native.check(status)

    def matvec(self, encoded: Encoded, x: int, batch: int, out: int, *, first: int = 0) -> None:
        """Multiply by rows `first` on; as `endor.kernels.matvec`, where `multiplies`.

        Args:
            encoded: The tensor.
            x: Address of `(batch, cols)` elements of its type, C-contiguous.
            batch: Rows of `x`.
            out: Address of float32 `(batch, rows - first)`, which is written.
            first: Rows before it are not read, and not in the result.

        Raises:
            ShapeError: There is no row `first`, or an array is of another size.
            FormatError: The arrays contradict each other.
        """
        kind, head = self._kind, self._head
        seen = self._seen
        view = seen[1] if seen is not None and seen[0] is encoded else self._view(encoded)
        if first:
            rows, cols = self.spec.shape
            if not 0 < first <= rows:
                raise ShapeError(f"first must be one of {rows} rows, got {first}")
            place = *head[:-2], first, rows - first, cols
            status = self._multiply_rows(
                self._number, view, *place, x, kind, batch, out, self._threads
            )
        else:
            status = self._multiply(self._number, view, *head, x, kind, batch, out, self._threads)
        if status:
            native.check(status)

    def forget(self) -> None:
        """Let go of the arrays that were seen last."""
        self._seen = None

    def _view(self, encoded: Encoded) -> Any:
        """Return a pointer to the library's view of the tensor; both are kept with its arrays."""
        seen = self._seen
        if seen is not None and seen[0] is encoded:
            return seen[1]
        view = type(self._form).from_buffer_copy(self._form)
        arrays = encoded.arrays
        for suffix, field, nbytes, itemsize in self._arrays:
            array = arrays[suffix]
            if array.nbytes != nbytes or array.itemsize != itemsize or not array.flags.c_contiguous:
                raise ShapeError(f"array {suffix!r} must be contiguous and have {nbytes} bytes")
            setattr(view, field, array.ctypes.data)
        pointer = ctypes.byref(view)
        self._seen = encoded, pointer
        return pointer
