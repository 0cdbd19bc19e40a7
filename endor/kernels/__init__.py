"""The codecs, fast, on the CPU: C kernels chosen at run time, numpy where there are none.

Same bytes and same elements as `endor.codecs`. Every function takes `threads` (default:
`ENDOR_THREADS`, or every CPU of the process) and `kernel` (default: `ENDOR_KERNEL`, or the best
this CPU runs).
"""

import ctypes

import numpy as np

from endor import codecs
from endor.codecs import CodecChoice, DType, Encoded
from endor.codecs.spec import MAX_NNZ
from endor.errors import DTypeError, ShapeError
from endor.kernels import bundles, chosen, fields, integer, native, neurons
from endor.kernels.dispatch import CHOICES, describe, select, thread_count
from endor.kernels.expand import decode
from endor.kernels.packing import Packer
from endor.kernels.prepared import Prepared
from endor.kernels.scratch import Scratch

__all__ = [
    "CHOICES",
    "Prepared",
    "Scratch",
    "bundles",
    "chosen",
    "decode",
    "describe",
    "encode",
    "fields",
    "integer",
    "matvec",
    "neurons",
    "probe_copy",
    "probe_read",
    "select",
    "thread_count",
]


def encode(
    bits: np.ndarray,
    dtype: DType,
    *,
    shape: tuple[int, ...] | None = None,
    codec: CodecChoice = "auto",
    bitmap: bool | None = None,
    threads: int | None = None,
    scratch: Scratch | None = None,
    kernel: str | None = None,
) -> Encoded:
    """Return `bits` in stored form: the bytes of `codecs.encode`, whose arguments these are.

    Args:
        bits: As there.
        dtype: As there.
        shape: As there.
        codec: As there.
        bitmap: As there.
        threads: As everywhere here.
        scratch: Holds the arrays of the result, which the next call with it overwrites. Packing
            into memory used before is several times faster than into fresh memory.
        kernel: As everywhere here.

    Raises:
        DTypeError: `bits` has the wrong element type.
        ShapeError: `shape` does not match.
        ConfigError: The forced codec does not apply.
        BackendError: The forced kernel cannot run here.
    """
    number, count = select(kernel), thread_count(threads)
    bits = codecs.check_bits(bits, dtype, shape)
    if number is None:
        return codecs.encode(bits, dtype, codec=codec, bitmap=bitmap)
    if codec == "dense" or not dtype.packable:
        none = np.zeros(256, dtype=np.int64)
        codecs.choose(bits.size, dtype, 0, none, codec=codec, bitmap=bitmap)
        return codecs.dense.encode(bits, dtype)
    packer = Packer(native.library(), number, bits, dtype, count, scratch)
    if codec == "raw" and bitmap is not False and bits.size <= MAX_NNZ:
        return packer.raw(bits.size)
    guess = packer.guess(codec, bitmap)
    if guess is not None:
        with packer.exp(guess, bits.size, counting=True) as begun:
            nnz, histogram = begun.nnz, begun.histogram
            plan = codecs.choose(bits.size, dtype, nnz, histogram, codec=codec, bitmap=bitmap)
            if begun.fits(plan):
                return begun.finish(plan)
    else:
        nnz, histogram = packer.statistics(bits)
        plan = codecs.choose(bits.size, dtype, nnz, histogram, codec=codec, bitmap=bitmap)
    if plan.codec == "dense":
        return codecs.dense.encode(bits, dtype)
    if plan.codec == "raw":
        return packer.raw(nnz)
    with packer.exp(plan, nnz if plan.bitmap else bits.size) as begun:
        return begun.finish(plan)


def matvec(
    encoded: Encoded,
    x: np.ndarray,
    out: np.ndarray,
    *,
    threads: int | None = None,
    kernel: str | None = None,
) -> np.ndarray:
    """Write `x @ W.T` to `out` and return it, W being the packed `(rows, cols)` weight.

    Products are accumulated in float32; the order of a row's sum depends on the kernel, not on the
    number of threads. The relative error against exact arithmetic, measured by `sum |W| |x|`, stays
    below `2**-24 * (cols / 16 + 16)`. Where the CPU multiplies bf16 pairs
    (`describe()["bf16_products"]`) and both operands are bf16, subnormal operands count as zero.

    Args:
        encoded: Weight of shape `(rows, cols)`: BF16, F16 or F32, any codec, valid as for `decode`.
        x: `(batch, cols)`, C-contiguous: float32, or bits of the weight's type, unsigned.
        out: float32 `(batch, rows)`, C-contiguous.

    Raises:
        ShapeError: A shape or layout does not fit.
        DTypeError: The weight or `x` has another type.
        FormatError: The arrays contradict each other.
        BackendError: The forced kernel cannot run here.
    """
    spec, number, count = encoded.spec, select(kernel), thread_count(threads)
    kind = native.WEIGHT_KINDS.get(spec.dtype.name)
    if kind is None:
        raise DTypeError(f"products take {', '.join(native.WEIGHT_KINDS)}, not {spec.dtype.name}")
    if x.dtype not in (spec.dtype.uint, np.float32):
        raise DTypeError(f"x must be float32 or {spec.dtype.uint} bits, got {x.dtype}")
    if out.dtype != np.float32:
        raise DTypeError(f"out must be float32, got {out.dtype}")
    if len(spec.shape) != 2 or x.ndim != 2 or x.shape[1] != spec.shape[1]:
        raise ShapeError(f"x {x.shape} must be (batch, cols) for a weight of shape {spec.shape}")
    if out.shape != (x.shape[0], spec.shape[0]):
        raise ShapeError(f"out must be {(x.shape[0], spec.shape[0])}, got {out.shape}")
    if not (x.flags.c_contiguous and out.flags.c_contiguous and out.flags.writeable):
        raise ShapeError("x and out must be C-contiguous, out writable")
    if spec.transposed:
        return neurons.product(encoded, x, neurons.active_neurons(x), out, count, number)
    if number is None:
        weight = codecs.decode(encoded)
        np.matmul(neurons.floats(x, spec.dtype), neurons.floats(weight, spec.dtype).T, out=out)
        return out
    library, view = native.library(), native.view(encoded)
    operand = (
        *spec.shape,
        x.ctypes.data,
        native.WEIGHT_KINDS["F32"] if x.dtype == np.float32 else kind,
        x.shape[0],
        out.ctypes.data,
        count,
    )
    if spec.codec == "int":
        native.check(library.endor_int_matvec(number, ctypes.byref(view), *operand))
    else:
        native.check(library.endor_matvec(number, ctypes.byref(view), kind, *operand))
    return out


def probe_copy(
    dst: np.ndarray, src: np.ndarray, threads: int | None = None, *, kernel: str | None = None
) -> None:
    """Copy `src` to `dst` as fast as this machine can, past the caches; for benchmarks.

    Raises:
        ShapeError: The two differ in bytes, or one is not contiguous.
    """
    if src.nbytes != dst.nbytes or not (src.flags.c_contiguous and dst.flags.c_contiguous):
        raise ShapeError(f"need two contiguous buffers of one size, got {dst.nbytes}, {src.nbytes}")
    number = select(kernel)
    if number is None:
        np.copyto(dst.reshape(-1).view(np.uint8), src.reshape(-1).view(np.uint8))
        return
    native.library().endor_probe(
        number, dst.ctypes.data, src.ctypes.data, src.nbytes, thread_count(threads)
    )


def probe_read(src: np.ndarray, threads: int | None = None, *, kernel: str | None = None) -> int:
    """Read `src` once, as fast as this machine can, and return a checksum; for benchmarks."""
    if not src.flags.c_contiguous:
        raise ShapeError("need a contiguous buffer")
    number = select(kernel)
    if number is None:
        words = src.reshape(-1).view(np.uint8)[: src.nbytes // 8 * 8].view(np.uint64)
        return int(np.bitwise_xor.reduce(words)) if words.size else 0
    return int(
        native.library().endor_probe(
            number, None, src.ctypes.data, src.nbytes, thread_count(threads)
        )
    )
