"""What a PyTorch `.bin` file holds, without running anything in it.

A `.bin` is a zip archive of one pickle and one uncompressed entry per storage. `torch_pickle` walks
the pickle and builds descriptions of tensors; bytes are then read from the file where an entry
lies. So no page is mapped (a mapped file that shrinks kills the process), memory holds one tensor,
and torch is not needed. Files older than PyTorch 1.6 are not zip archives: torch opens those with
`weights_only`, and they are held whole.
"""

import errno
import io
import math
import pickle
import struct
import warnings
import zipfile
from pathlib import Path
from typing import Any

from endor.checkpoint.sources.torch_pickle import (
    HeldTensor,
    StateMachine,
    Storage,
    StorageType,
    StoredTensor,
    Unsupported,
)
from endor.codecs import DType
from endor.dtypes import endor_dtype
from endor.errors import CheckpointError, DTypeError
from endor.foreign import describe_file
from endor.packed import bits_of
from endor.storage.safetensors import is_count, is_shape

ADVICE = "fetch it again, or re-save it with safetensors"

_ZIP_START = b"PK\x03\x04"
_LOCAL_HEADER = struct.Struct("<4s22xHH")
_MAX_PICKLE_BYTES = 256 << 20
_DESCRIPTIONS = (StoredTensor, HeldTensor, Unsupported)


def read_state(path: Path) -> dict[str, StoredTensor | HeldTensor]:
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
    out: dict[str, StoredTensor | HeldTensor] = {}
    for name, tensor in state.items():
        if not isinstance(name, str) or not isinstance(
            tensor, (StoredTensor, HeldTensor, Unsupported)
        ):
            raise CheckpointError(
                f"{path}: must map names to tensors; {name!r} is {type(tensor).__name__}"
            )
        if isinstance(tensor, Unsupported):
            raise CheckpointError(f"{path}: {name}: {tensor.what} are not supported; {ADVICE}")
        if isinstance(tensor, StoredTensor):
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


def _check_tensor(path: Path, name: str, tensor: StoredTensor) -> None:
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
        storages: dict[tuple[str, DType], Storage] = {}

        def locate(identity: Any) -> Storage:
            kind, key = identity[1], str(identity[2])
            if identity[0] != "storage" or not isinstance(kind, StorageType):
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
                found = storages[key, kind.dtype] = Storage(kind.dtype, offset, info.file_size)
            return found

        return StateMachine(io.BytesIO(text), locate).load()


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
            out[name] = Unsupported(f"{tensor.layout} tensors on {tensor.device.type}")
        elif tensor.numel() * tensor.element_size() > limit:
            raise CheckpointError(
                f"{path}: {name}: is expanded: its {tensor.numel() * tensor.element_size()} bytes "
                "exceed the file; save a contiguous copy"
            )
        else:
            out[name] = _held(tensor)
    return out


def _held(tensor: Any) -> HeldTensor | Unsupported:
    try:
        kind = endor_dtype(tensor.dtype)
    except DTypeError:
        kind = None
    if kind is None or kind.bits:
        return Unsupported(f"{tensor.dtype} tensors")
    return HeldTensor(kind, bits_of(tensor.detach()))
