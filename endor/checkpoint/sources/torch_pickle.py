"""The pickles in PyTorch's files, walked by a machine that can build nothing but descriptions.

It knows the opcodes and names that state dicts need; whatever else a pickle asks for is refused.
"""

import io
import math
import pickle
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from endor.codecs import DType, dtype
from endor.dtypes import TORCH_NAMES

_STORAGES = {
    "BFloat16Storage": "BF16",
    "HalfStorage": "F16",
    "FloatStorage": "F32",
    "DoubleStorage": "F64",
    "CharStorage": "I8",
    "ByteStorage": "U8",
    "UntypedStorage": "U8",
    "BoolStorage": "BOOL",
    "ShortStorage": "I16",
    "IntStorage": "I32",
    "LongStorage": "I64",
    "ComplexFloatStorage": "C64",
}


@dataclass(frozen=True, slots=True)
class Storage:
    """One entry of the archive: `nbytes` from `offset` on, of `dtype` where no tensor says more."""

    dtype: DType
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor over a storage; `start` and `strides` count elements."""

    storage: Storage
    dtype: DType
    start: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def span(self) -> int:
        """Elements from the first to behind the last."""
        if not math.prod(self.shape):
            return 0
        return 1 + sum(
            (size - 1) * stride for size, stride in zip(self.shape, self.strides, strict=True)
        )

    @property
    def contiguous(self) -> bool:
        expected = 1
        for size, stride in zip(reversed(self.shape), reversed(self.strides), strict=True):
            if size != 1 and stride != expected:
                return False
            expected *= size
        return True


@dataclass(frozen=True, slots=True)
class HeldTensor:
    """A tensor of a file that is held in memory: its bits, of its shape."""

    dtype: DType
    bits: np.ndarray

    @property
    def shape(self) -> tuple[int, ...]:
        return self.bits.shape


@dataclass(frozen=True, slots=True)
class Unsupported:
    """A tensor of a kind that holds no plain data."""

    what: str


@dataclass(frozen=True, slots=True)
class StorageType:
    dtype: DType


@dataclass(frozen=True, slots=True)
class _Scalar:
    """A torch dtype in a pickle; None where safetensors has no code for it."""

    name: str
    dtype: DType | None


def _rebuild(
    storage: Any, start: Any, shape: Any, strides: Any, dtype: DType | None = None
) -> StoredTensor:
    if not isinstance(storage, Storage):
        raise pickle.UnpicklingError("a tensor must lie over a storage")
    kind = dtype or storage.dtype
    return StoredTensor(storage, kind, start, tuple(shape), tuple(strides))


def _rebuild_v2(
    storage: Any,
    start: Any,
    shape: Any,
    strides: Any,
    _grad: Any = False,
    _hooks: Any = None,
    metadata: Any = None,
) -> StoredTensor | Unsupported:
    if metadata:
        return Unsupported("conjugate or negated views")
    return _rebuild(storage, start, shape, strides)


def _rebuild_v3(
    storage: Any,
    start: Any,
    shape: Any,
    strides: Any,
    _grad: Any,
    _hooks: Any,
    scalar: Any,
    metadata: Any = None,
) -> StoredTensor | Unsupported:
    if metadata or not isinstance(scalar, _Scalar):
        return Unsupported("such views")
    if scalar.dtype is None or scalar.dtype.bits:
        return Unsupported(f"{scalar.name} tensors")
    return _rebuild(storage, start, shape, strides, scalar.dtype)


def _unwrap(tensor: Any, *_rest: Any) -> Any:
    return tensor


def _rebuild_typed(function: Any, _kind: Any, arguments: Any, _state: Any) -> Any:
    if function not in (_rebuild_v2, _rebuild_v3):
        return Unsupported("tensors of other classes")
    return function(*arguments)


def _refuse(what: str) -> Callable[..., Unsupported]:
    return lambda *_arguments: Unsupported(what)


_FUNCTIONS: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("torch", "Size"): tuple,
    ("torch", "Tensor"): None,
    ("torch.nn.parameter", "Parameter"): None,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_v2,
    ("torch._utils", "_rebuild_tensor_v3"): _rebuild_v3,
    ("torch._utils", "_rebuild_parameter"): _unwrap,
    ("torch._utils", "_rebuild_parameter_with_state"): _unwrap,
    ("torch._tensor", "_rebuild_from_type_v2"): _rebuild_typed,
    ("torch._utils", "_rebuild_meta_tensor_no_storage"): _refuse(
        "meta tensors, which hold no data"
    ),
    ("torch._utils", "_rebuild_sparse_tensor"): _refuse("sparse tensors"),
    ("torch._utils", "_rebuild_sparse_csr_tensor"): _refuse("sparse tensors"),
    ("torch._utils", "_rebuild_qtensor"): _refuse("quantized tensors"),
    ("torch._utils", "_rebuild_nested_tensor"): _refuse("nested tensors"),
    ("torch._utils", "_rebuild_wrapper_subclass"): _refuse("tensors of other classes"),
    ("torch._utils", "_rebuild_device_tensor_from_numpy"): _refuse("tensors of other devices"),
    ("torch._utils", "_rebuild_device_tensor_from_cpu_tensor"): _refuse("tensors of other devices"),
    ("torch.serialization", "_get_layout"): _unwrap,
    ("torch", "device"): _unwrap,
}

_OPCODES = "PROTO FRAME STOP MARK POP POP_MARK DUP NONE NEWTRUE NEWFALSE INT BININT BININT1 BININT2"
_OPCODES += " LONG LONG1 LONG4 BINFLOAT FLOAT STRING BINSTRING SHORT_BINSTRING UNICODE BINUNICODE"
_OPCODES += " SHORT_BINUNICODE BINUNICODE8 BINBYTES SHORT_BINBYTES EMPTY_TUPLE TUPLE TUPLE1 TUPLE2"
_OPCODES += " TUPLE3 EMPTY_LIST LIST APPEND APPENDS EMPTY_DICT DICT SETITEM SETITEMS GLOBAL"
_OPCODES += " STACK_GLOBAL REDUCE BINPERSID GET BINGET LONG_BINGET PUT BINPUT LONG_BINPUT"
_OPCODES += " MEMOIZE"


def _opcodes() -> list[int]:
    return [getattr(pickle, name)[0] for name in _OPCODES.split()]


def _drop_state(machine: Any) -> None:
    """Ignore what is put on objects: state dicts carry module versions there."""
    machine.stack.pop()


class StateMachine(pickle._Unpickler):
    """The pure-Python pickle machine, with the opcodes and names that state dicts need.

    The C one is not taken: a put of entry 2^32 makes it allocate as many.
    """

    dispatch: ClassVar[dict[int, Callable[[pickle.Unpickler], None]]] = {
        **{code: pickle._Unpickler.dispatch[code] for code in _opcodes()},
        pickle.BUILD[0]: _drop_state,
    }

    def __init__(self, file: io.BytesIO, locate: Callable[[Any], Storage]) -> None:
        super().__init__(file, encoding="utf-8")
        self._locate = locate

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _FUNCTIONS:
            return _FUNCTIONS[module, name]
        if module in ("torch", "torch.storage") and name in _STORAGES:
            return StorageType(dtype(_STORAGES[name]))
        if module == "torch":
            code = TORCH_NAMES.get(name)
            return _Scalar(f"torch.{name}", dtype(code) if code else None)
        raise pickle.UnpicklingError(f"it wants to use {module}.{name}"[:200])

    def persistent_load(self, identity: Any) -> Storage:
        return self._locate(identity)
