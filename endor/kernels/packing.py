"""Packing one tensor with the compiled kernels: the arrays, and the calls that fill them."""

import ctypes
from types import TracebackType

import numpy as np

from endor import codecs
from endor.codecs import TILE, CodecChoice, DType, Encoded, Plan, TensorSpec
from endor.codecs.spec import BITMAP_TILE_BYTES, MAX_NNZ
from endor.kernels import native
from endor.kernels.scratch import Scratch

VIEW_NBYTES = 1 << 20
"""Arrays beyond this size stay a view of their larger buffer, most of it never touched."""

GUESSED_NBYTES = 1 << 20
"""Dense size from which a window is guessed: smaller tensors are read twice from the cache."""

SAMPLED_TILES = 128

TALLIED = 4
"""`ENDOR_TALLIED` of csrc/endor.h: code bits up to which packing counts exponents as well."""


class Packer:
    """The packed arrays of `bits`, from scratch or fresh, and what fills them.

    Attributes:
        bits: Contiguous elements, unsigned.
        dtype: Their type, packable.
    """

    def __init__(
        self,
        library: ctypes.CDLL,
        kernel: int,
        bits: np.ndarray,
        dtype: DType,
        threads: int,
        scratch: Scratch | None,
    ) -> None:
        self.library, self.kernel, self.threads = library, kernel, threads
        self.bits, self.dtype, self.scratch = bits, dtype, scratch

    def new(
        self, name: str, shape: tuple[int, ...], dtype: np.dtype[np.unsignedinteger]
    ) -> np.ndarray:
        """Return an array of arbitrary content."""
        if self.scratch is not None:
            return self.scratch.take(name, shape, dtype)
        return np.empty(shape, dtype=dtype)

    def bitmap_arrays(self, numel: int) -> dict[str, np.ndarray]:
        """Return room for the offsets and the bitmap of `numel` elements."""
        tiles = -(-numel // TILE)
        return {
            "tile_offsets": self.new("tile_offsets", (tiles + 1,), np.dtype("<u4")),
            "bitmap": self.new("bitmap", (tiles * BITMAP_TILE_BYTES,), np.dtype("u1")),
        }

    def trimmed(self, array: np.ndarray, size: int) -> np.ndarray:
        """Return the first `size` elements of `array`, a copy where a view would waste memory."""
        keep = self.scratch is not None or array.nbytes > VIEW_NBYTES or size == array.size
        return array[:size] if keep else array[:size].copy()

    def raw(self, room: int) -> Encoded:
        """Return the `raw` form; `room` is the number of stored elements, or at least as many.

        Raises:
            MemoryError: No memory for the bookkeeping.
        """
        arrays = self.bitmap_arrays(self.bits.size)
        values = self.new("values", (room,), self.dtype.uint)
        nnz = self.library.endor_pack_raw(
            self.kernel,
            self.bits.ctypes.data,
            self.bits.size,
            self.dtype.itemsize,
            arrays["bitmap"].ctypes.data,
            arrays["tile_offsets"].ctypes.data,
            values.ctypes.data,
            self.threads,
        )
        if nnz == native.UNKNOWN:
            raise MemoryError
        spec = TensorSpec(self.bits.shape, self.dtype, "raw", bitmap=True, nnz=nnz)
        return Encoded(spec, arrays | {"values": self.trimmed(values, nnz)})

    def statistics(self, bits: np.ndarray) -> tuple[int, np.ndarray]:
        """Return how many elements of `bits` have a bit set, and the counts of their exponents."""
        arrays = self.bitmap_arrays(bits.size)
        histogram = np.empty(256, dtype=np.uint64)
        nnz = self.library.endor_scan(
            self.kernel,
            bits.ctypes.data,
            bits.size,
            self.dtype.itemsize,
            self.dtype.exponent_bits,
            self.dtype.mantissa_bits,
            arrays["bitmap"].ctypes.data,
            arrays["tile_offsets"].ctypes.data,
            histogram.ctypes.data,
            self.threads,
        )
        return nnz, histogram.astype(np.int64)

    def guess(self, codec: CodecChoice, bitmap: bool | None) -> Plan | None:
        """Return the plan that fits a sample, if it lets the tensor be packed and counted at once.

        None for what is small, for float32, whose byte planes would have to be moved when their
        length is known, and for plans that are not `exp`.
        """
        dtype, size = self.dtype, self.bits.size
        if self.bits.nbytes < GUESSED_NBYTES or dtype.rest_bits >= 16 or size > MAX_NNZ:
            return None
        tiles = self.bits.reshape(-1)[: size // TILE * TILE].reshape(-1, TILE)
        sample = np.ascontiguousarray(tiles[:: -(-len(tiles) // SAMPLED_TILES)])
        nnz, histogram = self.statistics(sample)
        plan = codecs.choose(sample.size, dtype, nnz, histogram, codec=codec, bitmap=bitmap)
        zero_outside = -plan.base % (1 << dtype.exponent_bits) >= 1 << plan.k
        counts = plan.k <= TALLIED and (plan.bitmap or zero_outside)
        return plan if plan.codec == "exp" and counts else None

    def exp(self, plan: Plan, room: int, *, counting: bool = False) -> "Begun":
        """Pack all but the patches by the window of `plan`; `room` as for `raw`.

        Raises:
            MemoryError: No memory for the patches.
        """
        return Begun(self, plan, room, counting)


class Begun:
    """An `exp` tensor whose patches are still to come; a context, which frees them.

    Attributes:
        nnz, histogram: What `Packer.statistics` returns, if counted.
    """

    def __init__(self, packer: Packer, plan: Plan, room: int, counting: bool) -> None:
        self._packer, self._plan = packer, plan
        bits, dtype = packer.bits, packer.dtype
        spec = TensorSpec(bits.shape, dtype, "exp", plan.bitmap, room, plan.k, plan.base)
        arrays = packer.bitmap_arrays(bits.size) if plan.bitmap else {}
        for array in spec.arrays:
            if array.suffix not in arrays:
                name = "planes_room" if counting and array.suffix == "planes" else array.suffix
                arrays[array.suffix] = packer.new(name, array.shape, array.dtype.uint)
        self._arrays = arrays
        nnz = ctypes.c_uint64()
        counts = np.zeros(256, dtype=np.uint64)
        view = native.tensor(spec, arrays)
        self._job = packer.library.endor_exp_start(
            packer.kernel,
            ctypes.byref(view),
            bits.ctypes.data,
            counts.ctypes.data if counting else None,
            ctypes.byref(nnz),
            packer.threads,
        )
        if not self._job:
            raise MemoryError
        self.nnz, self.histogram = nnz.value, counts.astype(np.int64)

    def fits(self, plan: Plan) -> bool:
        """Return whether `plan` has the window that was packed by."""
        mine, other = ((p.codec, p.bitmap, p.k, p.base) for p in (self._plan, plan))
        return mine == other

    def finish(self, plan: Plan) -> Encoded:
        """Return the tensor; `plan` has the same window and the number of patches.

        Raises:
            FormatError: The elements changed since they were counted.
        """
        packer = self._packer
        stored = self.nnz if plan.bitmap else packer.bits.size
        spec = TensorSpec(
            packer.bits.shape,
            packer.dtype,
            "exp",
            plan.bitmap,
            stored,
            plan.k,
            plan.base,
            plan.patches,
        )
        arrays = {}
        for array in spec.arrays:
            found = self._arrays.get(array.suffix)
            if found is None:
                found = packer.new(array.suffix, array.shape, array.dtype.uint)
            elif array.suffix == "planes" and found.shape != array.shape:
                room, found = found, packer.new("planes", array.shape, array.dtype.uint)
                np.copyto(found, room[:, : array.shape[1]])
            elif array.suffix == "bytes" and found.shape != array.shape:  # one plane, or none
                found = packer.trimmed(found.reshape(-1), array.nbytes).reshape(array.shape)
            arrays[array.suffix] = found
        view = native.tensor(spec, arrays)
        native.check(packer.library.endor_exp_finish(self._job, ctypes.byref(view)))
        return Encoded(spec, arrays)

    def __enter__(self) -> "Begun":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._packer.library.endor_exp_free(self._job)
