"""ctypes binding of the C kernels: load the library, name its functions, describe tensors to it.

A plain shared library rather than an extension module: ctypes releases the GIL around every call,
and an install without a C compiler simply has no library.
"""

import ctypes
import functools
import logging
import operator
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from endor.codecs import Encoded, TensorSpec
from endor.codecs.coding import Coding, matrix_shape
from endor.errors import BackendError, FormatError, ShapeError

_log = logging.getLogger(__name__)

KERNELS = ("scalar", "avx2", "avx512", "neon")
"""Instruction sets by their number in the library; of those one CPU has, the last is the best."""

WEIGHT_KINDS = {"BF16": 0, "F16": 1, "F32": 2}
"""Element types that a product takes, by their number in the library."""

UNKNOWN = (1 << 64) - 1

STREAMING_NBYTES = 16 << 20
"""Outputs beyond this size are stored past the caches. Virtual machines report caches of any size,
so this does not ask."""

_CODECS = {"dense": 0, "raw": 1, "exp": 2}
_STATUS = {
    1: "the stored arrays contradict each other",
    2: "out of memory",
    3: "the kernel cannot run here",
}


class Tensor(ctypes.Structure):
    """`endor_tensor` of csrc/endor.h, field by field."""

    _fields_ = (
        ("numel", ctypes.c_uint64),
        ("nnz", ctypes.c_uint64),
        ("patches", ctypes.c_uint64),
        ("tile_offsets", ctypes.c_void_p),
        ("bitmap", ctypes.c_void_p),
        ("values", ctypes.c_void_p),
        ("bytes", ctypes.c_void_p),
        ("planes", ctypes.c_void_p),
        ("patch_offsets", ctypes.c_void_p),
        ("patch_ranks", ctypes.c_void_p),
        ("patch_exponents", ctypes.c_void_p),
        ("codec", ctypes.c_int32),
        ("itemsize", ctypes.c_int32),
        ("exponent_bits", ctypes.c_int32),
        ("mantissa_bits", ctypes.c_int32),
        ("rest_bits", ctypes.c_int32),
        ("k", ctypes.c_int32),
        ("base", ctypes.c_int32),
        ("reserved", ctypes.c_int32),
    )


class IntTensor(ctypes.Structure):
    """`endor_int` of csrc/int.h, field by field."""

    _fields_ = (
        ("numel", ctypes.c_uint64),
        ("cols", ctypes.c_uint64),
        ("n_words", ctypes.c_uint64),
        ("patches", ctypes.c_uint64),
        ("block_rows", ctypes.c_uint64),
        ("block_cols", ctypes.c_uint64),
        ("step_cols", ctypes.c_uint64),
        ("steps", ctypes.c_void_p),
        ("frequencies", ctypes.c_void_p),
        ("levels", ctypes.c_void_p),
        ("chunk_offsets", ctypes.c_void_p),
        ("states", ctypes.c_void_p),
        ("words", ctypes.c_void_p),
        ("low_bits", ctypes.c_void_p),
        ("patch_offsets", ctypes.c_void_p),
        ("patch_ranks", ctypes.c_void_p),
        ("patch_codes", ctypes.c_void_p),
        ("symbols", ctypes.c_int32),
        ("base", ctypes.c_int32),
        ("shift", ctypes.c_int32),
        ("step_kind", ctypes.c_int32),
        ("step_exponent", ctypes.c_int32),
        ("value_kind", ctypes.c_int32),
    )


@functools.cache
def load() -> tuple[ctypes.CDLL | None, str]:
    """Return the library and its path, or None and why there is none and what to do."""
    folder = Path(__file__).parent
    failures = []
    for path in sorted(folder.glob("_native*.so"), key=_foreign):
        try:
            library = _bind(ctypes.CDLL(str(path)))
            _log.debug("CPU kernels from %s", path)
            return library, str(path)
        except OSError as error:  # of another architecture or C library, or damaged
            failures.append(f"{path} does not load: {error}")
        except AttributeError as error:
            failures.append(f"{path} was built from other sources: {error}")
    return None, f"{'; '.join(failures) or f'no compiled library in {folder}'}; {_remedy(folder)}"


def _foreign(path: Path) -> tuple[bool, str]:
    """Sort the library's own name before those that other builds gave it."""
    return path.name != "_native.so", path.name


def _remedy(folder: Path) -> str:
    """Return how to get a library into `folder`, or how to run a package that has one."""
    root = folder.parent.parent
    elsewhere = [Path(entry or ".").resolve() / "endor" / "kernels" for entry in sys.path]
    for other in elsewhere:
        if other != folder.resolve() and any(other.glob("_native*.so")):
            return (
                f"Python runs from {root}, which hides the compiled package in "
                f"{other.parent.parent}: start it in another directory, or compile here with "
                f"`pip install -e {root}`"
            )
    if (root / "setup.py").exists():
        return f"install a C compiler, then `pip install -e {root}`"
    return (
        "install a wheel for this machine, or a C compiler and then Endor from its source again: "
        "`pip install --force-reinstall --no-deps --no-cache-dir endor-sparse`"
    )


def _bind(library: ctypes.CDLL) -> ctypes.CDLL:
    """Return `library`, its functions typed; AttributeError where it lacks one."""
    pointer, u64, i32 = ctypes.c_void_p, ctypes.c_uint64, ctypes.c_int
    for name, result, arguments in (
        ("kernels", ctypes.c_uint, ()),
        ("has_bf16_pairs", i32, (i32,)),
        ("cpu_features", ctypes.c_char_p, ()),
        ("decode", i32, (i32, pointer, pointer, u64, u64, i32, i32)),
        ("scan", u64, (i32, pointer, u64, i32, i32, i32, pointer, pointer, pointer, i32)),
        ("pack_raw", u64, (i32, pointer, u64, i32, pointer, pointer, pointer, i32)),
        ("exp_start", pointer, (i32, pointer, pointer, pointer, pointer, i32)),
        ("exp_finish", i32, (pointer, pointer)),
        ("exp_free", None, (pointer,)),
        ("matvec", i32, (i32, pointer, i32, u64, u64, pointer, i32, u64, pointer, i32)),
        ("matvec_rows", i32, (i32, pointer, i32, u64, u64, u64, pointer, i32, u64, pointer, i32)),
        (
            "matvec_chosen",
            i32,
            (i32, pointer, i32, u64, u64, pointer, u64, pointer, i32, u64, pointer, i32),
        ),
        ("int_decode", i32, (i32, pointer, pointer, u64, u64, i32, i32, i32)),
        (
            "int_encode",
            i32,
            (i32, pointer, u64, pointer, i32, i32, pointer, pointer, pointer, i32),
        ),
        ("int_count", i32, (pointer, u64, ctypes.c_int32, ctypes.c_uint32, pointer)),
        (
            "int_symbols",
            i32,
            (pointer, u64, ctypes.c_int32, *(i32, pointer, i32, i32), *(pointer,) * 3, i32),
        ),
        ("int_matvec", i32, (i32, pointer, u64, u64, pointer, i32, u64, pointer, i32)),
        ("int_matvec_rows", i32, (i32, pointer, u64, u64, u64, pointer, i32, u64, pointer, i32)),
        (
            "neurons",
            i32,
            (i32, pointer, i32, u64, u64, pointer, u64, pointer, u64, pointer, i32),
        ),
        ("bundles_count", i32, (pointer, pointer, pointer, i32)),
        ("bundles_pack", i32, (i32, pointer, pointer, pointer, i32)),
        ("bundles_decode", i32, (i32, pointer, pointer, i32)),
        (
            "bundles_neurons",
            i32,
            (i32, pointer, i32, pointer, u64, pointer, u64, pointer, i32),
        ),
        ("read_many", i32, (i32, u64, *(pointer,) * 4)),
        ("active", u64, (pointer, u64, u64, i32, pointer)),
        ("turn", None, (pointer, pointer, u64, u64, u64, u64, i32, i32)),
        ("probe", u64, (i32, pointer, pointer, u64, i32)),
        ("count16", i32, (pointer, u64, ctypes.c_uint32, pointer)),
        ("zero_below16", i32, (pointer, u64, ctypes.c_uint32, ctypes.c_uint32, u64)),
    ):
        function = getattr(library, f"endor_{name}")
        function.restype, function.argtypes = result, arguments
    return library


def library() -> ctypes.CDLL:
    """Return the loaded library.

    Raises:
        BackendError: There is none.
    """
    loaded, why = load()
    if loaded is None:
        raise BackendError(f"the native kernels are missing: {why}")
    return loaded


@functools.cache
def available() -> tuple[str, ...]:
    """Return the names of the compiled kernels that this CPU runs, best last."""
    loaded, _ = load()
    mask = loaded.endor_kernels() if loaded is not None else 0
    return tuple(name for i, name in enumerate(KERNELS) if mask >> i & 1)


def check(status: int) -> None:
    """Raise the error that a kernel's return value stands for."""
    if status == 0:
        return
    if status == 2:
        raise MemoryError
    message = _STATUS.get(status, f"unknown status {status}")
    raise (FormatError if status == 1 else BackendError)(
        f"native kernel: {message}; `endor verify` finds where"
        if status == 1
        else f"native kernel: {message}"
    )


def tensor(spec: TensorSpec, arrays: dict[str, np.ndarray]) -> Tensor | IntTensor:
    """Return the library's view of a stored tensor; `arrays` must outlive it.

    Types and sizes are checked, for the kernels rely on them; contents are not.

    Raises:
        ShapeError: An array is missing, or is not what `spec` promises.
    """
    out = form(spec)
    for expected in spec.arrays:
        array = arrays.get(expected.suffix)
        if (
            array is None
            or array.nbytes != expected.nbytes
            or array.itemsize != expected.dtype.itemsize
            or not array.flags.c_contiguous
        ):
            found = "nothing" if array is None else f"{array.dtype} {array.shape}"
            raise ShapeError(
                f"array {expected.suffix!r} must be contiguous {expected.dtype.name} "
                f"{expected.shape}, got {found}"
            )
        setattr(out, expected.suffix or "values", array.ctypes.data)
    return out


def form(spec: TensorSpec) -> Tensor | IntTensor:
    """Return the library's view of a tensor that is stored so, its arrays yet unknown."""
    return element_form(spec) if spec.coding is None else _int_tensor(spec, spec.coding)


def _int_tensor(spec: TensorSpec, coding: Coding) -> IntTensor:
    coding.check(spec.shape, spec.dtype)
    return IntTensor(
        numel=spec.numel,
        cols=max(matrix_shape(spec.shape)[1], 1),
        n_words=coding.words,
        patches=spec.patches,
        block_rows=coding.step_block[0],
        block_cols=coding.step_block[1],
        step_cols=coding.step_shape(spec.shape)[1],
        symbols=coding.symbols,
        base=coding.base,
        shift=coding.shift,
        step_kind=WEIGHT_KINDS[coding.step_dtype],
        step_exponent=coding.step_exponent,
        value_kind=WEIGHT_KINDS[spec.dtype.name],
    )


def element_form(spec: TensorSpec) -> Tensor:
    """Return the library's view of a tensor in codec `dense`, `raw` or `exp`, without arrays."""
    return Tensor(
        numel=spec.numel,
        nnz=spec.nnz,
        patches=spec.patches,
        codec=_CODECS[spec.codec],
        itemsize=spec.dtype.itemsize,
        exponent_bits=spec.dtype.exponent_bits,
        mantissa_bits=spec.dtype.mantissa_bits,
        rest_bits=spec.dtype.rest_bits,
        k=spec.k,
        base=spec.base,
    )


View = TypeVar("View", bound=ctypes.Structure)

_views: dict[int, tuple["weakref.ref[Encoded]", tuple[np.ndarray, ...], Any]] = {}
"""By id, the last view of each live `Encoded`: making one takes longer than a small product."""


def view(encoded: Encoded) -> Tensor | IntTensor:
    """Return the library's view of `encoded`, which must outlive it; errors as for `tensor`."""
    return kept_view(encoded, lambda: tensor(encoded.spec, dict(encoded.arrays)))


def kept_view(encoded: Encoded, make: Callable[[], View]) -> View:
    """Return the view that `make` gives, kept as long as `encoded` lives and holds the same arrays.

    There is one of each `Encoded`.
    """
    key, arrays = id(encoded), encoded.arrays
    seen = _views.get(key)
    if (
        seen is not None
        and seen[0]() is encoded
        and len(seen[1]) == len(arrays)
        and all(map(operator.is_, seen[1], arrays.values()))
    ):
        found: View = seen[2]
        return found
    made = make()
    _views[key] = (
        weakref.ref(encoded, lambda _: _views.pop(key, None)),
        tuple(arrays.values()),
        made,
    )
    return made
