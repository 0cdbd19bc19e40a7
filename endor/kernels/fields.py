"""Codec `fields`, fast: the bytes of `endor.codecs.fields`, and its elements back."""

import ctypes

import numpy as np

from endor.codecs import DType, Encoded, rans
from endor.codecs import fields as reference
from endor.codecs.coding import CHUNK
from endor.codecs.layout import Layout
from endor.codecs.planning import CodePlan
from endor.kernels import integer, native
from endor.kernels.dispatch import select, thread_count


def encode(
    bits: np.ndarray,
    dtype: DType,
    layout: Layout,
    *,
    shape: tuple[int, ...] | None = None,
    threads: int | None = None,
    kernel: str | None = None,
) -> Encoded | None:
    """Return a tensor in stored form: the bytes of `codecs.fields.encode`, arguments as there."""
    number, count = select(kernel), thread_count(threads)

    def code(symbols: np.ndarray, plan: CodePlan) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        assert number is not None
        return integer.code(symbols, plan, count, number)

    coder = rans.code if number is None else code
    return reference.encode(bits, dtype, layout, shape=shape, coder=coder)


def decode(encoded: Encoded, out: np.ndarray, start: int, threads: int, number: int | None) -> None:
    """Write the bytes from `start` on to `out`, u8; `endor.kernels.decode` has checked the rest."""

    def symbols_of(
        frequencies: np.ndarray,
        chunk_offsets: np.ndarray,
        states: np.ndarray,
        words: np.ndarray,
        count: int,
    ) -> np.ndarray:
        codes = np.empty(-(-count // CHUNK) * CHUNK, dtype=np.int32)
        view = native.IntTensor(
            numel=count,
            cols=1,
            n_words=words.size,
            block_rows=1,
            block_cols=1,
            step_cols=1,
            symbols=frequencies.size,
            frequencies=frequencies.ctypes.data,
            chunk_offsets=chunk_offsets.ctypes.data,
            states=states.ctypes.data,
            words=words.ctypes.data,
        )
        status = native.library().endor_int_decode(
            number, ctypes.byref(view), codes.ctypes.data, 0, count, 1, threads, 0
        )
        native.check(status)
        return codes[:count].astype(np.uint8)

    decoder = rans.symbols_of if number is None else symbols_of
    reference.decode(encoded, out, start, decoder=decoder)
