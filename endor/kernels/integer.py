"""Codec `int`, fast: the bytes of `endor.codecs.integer`, and its elements back."""

import ctypes

import numpy as np

from endor.codecs import DType, Encoded
from endor.codecs import integer as reference
from endor.codecs.coding import CHUNK, LANES
from endor.codecs.planning import CodePlan
from endor.kernels import native
from endor.kernels.dispatch import select, thread_count


def encode(
    codes: np.ndarray,
    steps: np.ndarray | float,
    dtype: DType,
    *,
    shape: tuple[int, ...] | None = None,
    block: tuple[int, int] | None = None,
    levels: np.ndarray | None = None,
    threads: int | None = None,
    kernel: str | None = None,
) -> Encoded:
    """Return integer codes and their steps in stored form.

    The bytes of `codecs.integer.encode`, whose arguments and errors these are; `threads` and
    `kernel` as everywhere here. Peak memory is 6 bytes a code, beside those of int32 and the
    result.
    """
    number, count = select(kernel), thread_count(threads)
    if number is None:
        return reference.encode(codes, steps, dtype, shape=shape, block=block, levels=levels)
    codes, values, block, plan = reference.prepare(
        codes, steps, dtype, shape, block, count_codes, levels
    )
    symbols, low_bits, patched = split(codes.reshape(-1), plan, count)
    states, counts, words = code(symbols, plan, count, number)
    return reference.assemble(
        codes, dtype, plan, values, block, states, counts, words, patched, low_bits, levels
    )


def count_codes(codes: np.ndarray, low: int, size: int) -> np.ndarray:
    """Return how many of flat int32 `codes` are `low`, `low + 1`, ..., int64 `(size,)`."""
    counts = np.empty(size, dtype=np.int64)
    library = native.library()
    native.check(
        library.endor_int_count(codes.ctypes.data, codes.size, low, size, counts.ctypes.data)
    )
    return counts


def split(
    codes: np.ndarray, plan: CodePlan, threads: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return symbols, packed low bits, and where patches go: what the numpy reference makes."""
    rows = -(-codes.size // LANES)
    symbols = np.empty(codes.size, dtype=np.uint8)
    low_bits = np.empty(4 * plan.shift * rows, dtype=np.uint8)
    marks = np.empty(rows, dtype="<u4")
    frequencies = plan.frequencies.astype(np.uint16)
    status = native.library().endor_int_symbols(
        codes.ctypes.data,
        codes.size,
        plan.base,
        plan.shift,
        frequencies.ctypes.data,
        frequencies.size,
        plan.substitute,
        symbols.ctypes.data,
        low_bits.ctypes.data,
        marks.ctypes.data,
        threads,
    )
    native.check(status)
    marked = np.flatnonzero(marks)
    bits = np.unpackbits(marks[marked].view(np.uint8), bitorder="little").reshape(-1, LANES)
    row, lane = np.nonzero(bits)
    return symbols, low_bits, marked[row] * LANES + lane


def code(
    symbols: np.ndarray, plan: CodePlan, threads: int, number: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return states, words of each chunk, and words: what `codecs.rans.code` returns."""
    n_chunks = -(-symbols.size // CHUNK)
    states = np.empty((n_chunks, LANES), dtype=np.uint32)
    counts = np.empty(n_chunks, dtype=np.uint32)
    room = np.empty((n_chunks, CHUNK), dtype=np.uint16)
    frequencies = plan.frequencies.astype(np.uint16)
    status = native.library().endor_int_encode(
        number,
        symbols.ctypes.data,
        symbols.size,
        frequencies.ctypes.data,
        frequencies.size,
        plan.substitute,
        states.ctypes.data,
        counts.ctypes.data,
        room.ctypes.data,
        threads,
    )
    native.check(status)
    parts = [room[i, CHUNK - int(counts[i]) :] for i in range(n_chunks)]
    words = np.concatenate(parts) if parts else np.empty(0, dtype=np.uint16)
    return states, counts, words


def codes_of(
    encoded: Encoded, *, threads: int | None = None, kernel: str | None = None
) -> np.ndarray:
    """Return the codes, int32, of the tensor's shape; errors as `codecs.integer.codes_of`."""
    number, spec = select(kernel), encoded.spec
    if number is None or spec.coding is None:
        return reference.codes_of(encoded)
    out = np.empty(spec.shape, dtype=np.int32)
    view = native.view(encoded)
    native.check(
        native.library().endor_int_decode(
            number,
            ctypes.byref(view),
            out.ctypes.data,
            0,
            spec.numel,
            1,
            thread_count(threads),
            int(out.nbytes > native.STREAMING_NBYTES),
        )
    )
    return out


def decode(
    encoded: Encoded,
    out: np.ndarray,
    start: int,
    stop: int,
    threads: int,
    streaming: bool | None,
    number: int,
) -> None:
    """Write elements `[start, stop)` to `out`; `endor.kernels.decode` has checked everything."""
    view = native.view(encoded)
    if streaming is None:
        streaming = (stop - start) * encoded.spec.dtype.itemsize > native.STREAMING_NBYTES
    status = native.library().endor_int_decode(
        number, ctypes.byref(view), out.ctypes.data, start, stop, 0, threads, int(streaming)
    )
    native.check(status)
