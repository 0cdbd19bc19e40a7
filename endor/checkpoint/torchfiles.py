"""PyTorch `.bin` checkpoints, read by offset; nothing in them is ever run.

A `.bin` is a zip archive of one pickle and one uncompressed entry per storage. The pickle is walked
by a reduced machine that knows the opcodes and names that tensors need, and builds descriptions
of them; bytes are then read from the file where an entry lies. So no page is mapped (a mapped file
that shrinks kills the process), memory holds one tensor, and torch is not needed. Files older than
PyTorch 1.6 are not zip archives: torch opens those with `weights_only`, and they are held whole.
"""

import errno
import io
import math
import pickle
import struct
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from endor.checkpoint.choose import Choice, read_config
from endor.checkpoint.files import OpenFiles
from endor.checkpoint.source import check_index, fingerprint_files
from endor.checkpoint.tensors import SourceTensor
from endor.codecs import DType, dtype
from endor.errors import CheckpointError, DTypeError
from endor.foreign import describe_file
from endor.packed import TORCH_NAMES, bits_of, endor_dtype
from endor.storage.header import is_count, is_shape

ADVICE = "fetch it again, or re-save it with safetensors"

_ZIP_START = b"PK\x03\x04"
_LOCAL_HEADER = struct.Struct("<4s22xHH")
_MAX_PICKLE_BYTES = 256 << 20
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
_PIECE_BYTES = 16 << 20


@dataclass(frozen=True, slots=True)
class _Storage:
    """One entry of the archive: `nbytes` from `offset` on, of `dtype` where no tensor says more."""

    dtype: DType
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class _Tensor:
    """A tensor over a storage; `start` and `strides` count elements."""

    storage: _Storage
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
class _Held:
    """A tensor of a file that is held in memory: its bits, of its shape."""

    dtype: DType
    bits: np.ndarray

    @property
    def shape(self) -> tuple[int, ...]:
        return self.bits.shape


@dataclass(frozen=True, slots=True)
class _Unsupported:
    """A tensor of a kind that holds no plain data."""

    what: str


class TorchSource:
    """A `.bin` file, or shards of them with an index.

    Args:
        path: The directory.
        choice: Its weight files.
    """

    ordered = False

    def __init__(self, path: Path, choice: Choice) -> None:
        self.path = path
        self.directory: Path | None = path
        self.tensors: dict[str, SourceTensor] = {}
        self._paths = [path / file for file in choice.files]
        self._files = OpenFiles()
        self._states: dict[str, dict[str, _Tensor | _Held]] = {}
        found: dict[str, list[str]] = {}
        for file in choice.files:
            state = self._states[file] = _load(path / file)
            for name in state:
                found.setdefault(name, []).append(file)
        self._homes = check_index(path, choice, found, self._equal)
        for name, file in self._homes.items():
            written = Path(file).with_suffix(".safetensors").as_posix()
            written = written.replace("pytorch_model", "model")
            tensor = self._states[file][name]
            self.tensors[name] = SourceTensor(name, tensor.dtype, tensor.shape, written)

    def _equal(self, name: str, one: str, other: str) -> bool:
        first, second = self._states[one][name], self._states[other][name]
        if (first.dtype, first.shape) != (second.dtype, second.shape):
            return False
        pieces = []
        for file in (one, other):
            out = np.empty(math.prod(first.shape) * first.dtype.itemsize, dtype=np.uint8)
            self._read(file, name, out)
            pieces.append(out)
        return np.array_equal(pieces[0], pieces[1])

    def read_into(self, name: str, out: np.ndarray) -> None:
        self._read(self._homes[name], name, out)

    def _read(self, file: str, name: str, out: np.ndarray) -> None:
        tensor = self._states[file][name]
        if isinstance(tensor, _Held):
            out.view(tensor.dtype.uint)[...] = tensor.bits.reshape(-1)
            return
        if not out.size:
            return
        uint = tensor.dtype.uint
        offset = tensor.storage.offset + tensor.start * uint.itemsize
        if tensor.contiguous:
            self._files.read_into(self.path / file, offset, out)
            return
        held = np.empty(tensor.span * uint.itemsize, dtype=np.uint8)
        self._files.read_into(self.path / file, offset, held)
        strides = [stride * uint.itemsize for stride in tensor.strides]
        seen = np.lib.stride_tricks.as_strided(held.view(uint), tensor.shape, strides)
        out.view(uint).reshape(tensor.shape)[...] = seen

    def config(self) -> dict[str, Any] | None:
        return read_config(self.directory)

    def fingerprint(self) -> str:
        return fingerprint_files(self._paths)

    def close(self) -> None:
        self._states.clear()
        self._files.close()


def _load(path: Path) -> dict[str, _Tensor | _Held]:
    """Return what the tensors of a `.bin` file are, by name.

    Raises:
        CheckpointError: The file is damaged, or holds something else than plain tensors.
    """
    with path.open("rb") as file:
        start = file.read(4)
    try:
        state = _walk(path) if start == _ZIP_START else _legacy(path)
    except (CheckpointError, MemoryError):
        raise
    except OSError as error:
        if error.errno != errno.EINVAL:  # a seek to where no file begins: the archive is damaged
            raise
        raise _unloadable(path, error) from None
    except Exception as error:  # whatever a hostile archive or pickle makes them raise
        raise _unloadable(path, error) from None
    if not isinstance(state, dict):
        raise CheckpointError(f"{path}: must hold a state dict, got {type(state).__name__}")
    out: dict[str, _Tensor | _Held] = {}
    for name, tensor in state.items():
        if not isinstance(name, str) or not isinstance(tensor, (_Tensor, _Held, _Unsupported)):
            raise CheckpointError(
                f"{path}: must map names to tensors; {name!r} is {type(tensor).__name__}"
            )
        if isinstance(tensor, _Unsupported):
            raise CheckpointError(f"{path}: {name}: {tensor.what} are not supported; {ADVICE}")
        if isinstance(tensor, _Tensor):
            _check_tensor(path, name, tensor)
        out[_plain_name(path, name)] = tensor
    return out


def _unloadable(path: Path, error: Exception) -> CheckpointError:
    described = describe_file(path)
    if described is not None and path.suffix != ".bin":
        return CheckpointError(f"{path}: {described}")
    if described is not None and "PyTorch" not in described:
        return CheckpointError(f"{path}: {described}")
    reason = " ".join(str(error).split())[:200] or type(error).__name__
    return CheckpointError(f"{path}: not a loadable weights-only PyTorch file: {reason}; {ADVICE}")


def _plain_name(path: Path, name: str) -> str:
    try:
        name.encode()
    except UnicodeEncodeError:
        raise CheckpointError(f"{path}: name {name!r} is not valid Unicode; {ADVICE}") from None
    if "\0" in name:
        raise CheckpointError(f"{path}: name {name!r} holds a NUL; {ADVICE}")
    return name


def _check_tensor(path: Path, name: str, tensor: _Tensor) -> None:
    numbers = [tensor.start, *tensor.strides]
    if not is_shape(list(tensor.shape)) or not all(map(is_count, numbers)):
        raise CheckpointError(
            f"{path}: {name}: must have sizes and strides that an array can have, got "
            f"{str(tensor.shape)[:100]}; {ADVICE}"
        )
    if len(tensor.strides) != len(tensor.shape):
        raise CheckpointError(f"{path}: {name}: has {len(tensor.strides)} strides; {ADVICE}")
    itemsize = tensor.dtype.itemsize
    if (tensor.start + tensor.span) * itemsize > tensor.storage.nbytes and tensor.span:
        raise CheckpointError(
            f"{path}: {name}: reaches to byte {(tensor.start + tensor.span) * itemsize} of a "
            f"storage of {tensor.storage.nbytes}; {ADVICE}"
        )
    nbytes = math.prod(tensor.shape) * itemsize
    if nbytes > path.stat().st_size:
        raise CheckpointError(
            f"{path}: {name}: is expanded: its {nbytes} bytes would be made of "
            f"{tensor.span * itemsize}; save a contiguous copy"
        )


def _walk(path: Path) -> Any:
    """Return the object in an archive, with descriptions in the place of tensors."""
    with path.open("rb") as file, zipfile.ZipFile(file) as archive:
        entries = {info.filename: info for info in archive.infolist()}
        pickles = [name for name in entries if name.endswith("/data.pkl") or name == "data.pkl"]
        if len(pickles) != 1:
            raise CheckpointError(f"{path}: must hold one data.pkl, has {len(pickles)}; {ADVICE}")
        root = pickles[0].removesuffix("data.pkl")
        if f"{root}constants.pkl" in entries:
            raise CheckpointError(f"{path}: is a TorchScript program, not weights; {ADVICE}")
        order = entries.get(f"{root}byteorder")
        if order is not None and archive.read(order) != b"little":
            raise CheckpointError(f"{path}: must be little-endian; {ADVICE}")
        if entries[pickles[0]].file_size > _MAX_PICKLE_BYTES:
            raise CheckpointError(f"{path}: its pickle must be at most {_MAX_PICKLE_BYTES} bytes")
        text = archive.read(pickles[0])
        storages: dict[tuple[str, DType], _Storage] = {}

        def locate(identity: Any) -> _Storage:
            kind, key = identity[1], str(identity[2])
            if identity[0] != "storage" or not isinstance(kind, _StorageType):
                raise pickle.UnpicklingError(f"persistent id {str(identity)[:80]}")
            found = storages.get((key, kind.dtype))
            if found is None:
                info = entries[f"{root}data/{key}"]
                if info.compress_type != zipfile.ZIP_STORED:
                    raise CheckpointError(f"{path}: must not be compressed; {ADVICE}")
                file.seek(info.header_offset)
                head = file.read(_LOCAL_HEADER.size)
                magic, name_bytes, extra_bytes = _LOCAL_HEADER.unpack(head)
                offset = info.header_offset + len(head) + name_bytes + extra_bytes
                if magic != _ZIP_START or offset + info.file_size > path.stat().st_size:
                    raise pickle.UnpicklingError(f"storage {key} lies outside the file")
                found = storages[key, kind.dtype] = _Storage(kind.dtype, offset, info.file_size)
            return found

        return _Walker(io.BytesIO(text), locate).load()


@dataclass(frozen=True, slots=True)
class _StorageType:
    dtype: DType


@dataclass(frozen=True, slots=True)
class _Scalar:
    """A torch dtype in a pickle; None where safetensors has no code for it."""

    name: str
    dtype: DType | None


def _rebuild(
    storage: Any, start: Any, shape: Any, strides: Any, dtype: DType | None = None
) -> _Tensor:
    if not isinstance(storage, _Storage):
        raise pickle.UnpicklingError("a tensor must lie over a storage")
    kind = dtype or storage.dtype
    return _Tensor(storage, kind, start, tuple(shape), tuple(strides))


def _rebuild_v2(
    storage: Any,
    start: Any,
    shape: Any,
    strides: Any,
    _grad: Any = False,
    _hooks: Any = None,
    metadata: Any = None,
) -> _Tensor | _Unsupported:
    if metadata:
        return _Unsupported("conjugate or negated views")
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
) -> _Tensor | _Unsupported:
    if metadata or not isinstance(scalar, _Scalar):
        return _Unsupported("such views")
    if scalar.dtype is None or scalar.dtype.bits:
        return _Unsupported(f"{scalar.name} tensors")
    return _rebuild(storage, start, shape, strides, scalar.dtype)


def _unwrap(tensor: Any, *_rest: Any) -> Any:
    return tensor


def _rebuild_typed(function: Any, _kind: Any, arguments: Any, _state: Any) -> Any:
    if function not in (_rebuild_v2, _rebuild_v3):
        return _Unsupported("tensors of other classes")
    return function(*arguments)


def _refuse(what: str) -> Callable[..., _Unsupported]:
    return lambda *_arguments: _Unsupported(what)


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


class _Walker(pickle._Unpickler):
    """The pure-Python pickle machine, with the opcodes and names that state dicts need.

    The C one is not taken: a put of entry 2^32 makes it allocate as many.
    """

    dispatch: ClassVar[dict[int, Callable[[pickle.Unpickler], None]]] = {
        **{code: pickle._Unpickler.dispatch[code] for code in _opcodes()},
        pickle.BUILD[0]: _drop_state,
    }

    def __init__(self, file: io.BytesIO, locate: Callable[[Any], _Storage]) -> None:
        super().__init__(file, encoding="utf-8")
        self._locate = locate

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _FUNCTIONS:
            return _FUNCTIONS[module, name]
        if module in ("torch", "torch.storage") and name in _STORAGES:
            return _StorageType(dtype(_STORAGES[name]))
        if module == "torch":
            code = TORCH_NAMES.get(name)
            return _Scalar(f"torch.{name}", dtype(code) if code else None)
        raise pickle.UnpicklingError(f"it wants to use {module}.{name}"[:200])

    def persistent_load(self, identity: Any) -> _Storage:
        return self._locate(identity)


def _legacy(path: Path) -> Any:
    """Return the state dict of a file that is no archive, held in memory, as arrays of bits."""
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about files that are refused right after
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=False)
    if not isinstance(state, dict):
        return state
    limit = path.stat().st_size
    out: dict[Any, Any] = {}
    for name, tensor in state.items():
        if not isinstance(tensor, torch.Tensor):
            out[name] = tensor
        elif tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.is_quantized:
            out[name] = _Unsupported(f"{tensor.layout} tensors on {tensor.device.type}")
        elif tensor.numel() * tensor.element_size() > limit:
            raise CheckpointError(
                f"{path}: {name}: is expanded: its {tensor.numel() * tensor.element_size()} bytes "
                "exceed the file; save a contiguous copy"
            )
        else:
            out[name] = _held(tensor)
    return out


def _held(tensor: Any) -> _Held | _Unsupported:
    try:
        kind = endor_dtype(tensor.dtype)
    except DTypeError:
        kind = None
    if kind is None or kind.bits:
        return _Unsupported(f"{tensor.dtype} tensors")
    return _Held(kind, bits_of(tensor.detach()))
