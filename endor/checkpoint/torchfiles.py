"""PyTorch `.bin` checkpoints, opened with `weights_only` and mapped, never unpickled freely.

A mapped page counts as resident memory once read, so each tensor's pages are given back after it
was copied. Files older than PyTorch 1.6 (not zip archives) cannot be mapped: those are held whole.
"""

import ctypes
import mmap
import pickle
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch

from endor.checkpoint.source import check_names, fingerprint_files, read_config
from endor.checkpoint.tensors import SourceTensor
from endor.codecs import dtype
from endor.errors import CheckpointError

TORCH_CODES: dict[torch.dtype, str] = {
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e8m0fnu: "F8_E8M0",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.int16: "I16",
    torch.uint16: "U16",
    torch.int32: "I32",
    torch.uint32: "U32",
    torch.int64: "I64",
    torch.uint64: "U64",
    torch.complex64: "C64",
}

_MADV_DONTNEED = 4
_libc = ctypes.CDLL(None, use_errno=True)


class TorchSource:
    """A `.bin` file, or shards of them with an index."""

    ordered = False

    def __init__(self, path: Path, files: dict[str, frozenset[str] | None]) -> None:
        self.path = path
        self.directory: Path | None = path
        self.tensors: dict[str, SourceTensor] = {}
        self._paths = [path / file for file in files]
        self._state: dict[str, torch.Tensor] = {}
        self._mapped: set[str] = set()
        for file, expected in files.items():
            state, mapped = _load(path / file)
            check_names(path / file, state, expected)
            for name, tensor in state.items():
                if name in self.tensors:
                    raise CheckpointError(
                        f"{path}: {name} is both in {self.tensors[name].file} and {file}"
                    )
                code = dtype(TORCH_CODES[tensor.dtype])
                dense_file = f"{Path(file).stem}.safetensors".replace("pytorch_model", "model")
                self.tensors[name] = SourceTensor(name, code, tuple(tensor.shape), dense_file)
                self._state[name] = tensor
            self._mapped.update(state if mapped else ())

    def read_into(self, name: str, out: np.ndarray) -> None:
        tensor = self._state[name]
        if not tensor.numel():
            return
        target = torch.from_numpy(out).view(tensor.dtype).view(tensor.shape)
        target.copy_(tensor)
        if name in self._mapped:
            storage = tensor.untyped_storage()
            _drop_pages(storage.data_ptr(), storage.nbytes())

    def config(self) -> dict[str, Any] | None:
        return read_config(self.directory)

    def fingerprint(self) -> str:
        return fingerprint_files(self._paths)

    def close(self) -> None:
        self._state.clear()


def _load(path: Path) -> tuple[dict[str, torch.Tensor], bool]:
    """Return the state dict in `path`, and whether its storages are mapped from the file."""
    try:
        with path.open("rb") as file:
            zipped = file.read(4) == b"PK\x03\x04"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about files that are refused right after
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(
            f"{path}: not a loadable weights-only PyTorch file: {reason}; fetch it again, "
            "or re-save it with safetensors"
        ) from None
    if not isinstance(state, dict):
        raise CheckpointError(f"{path}: must hold a state dict, got {type(state).__name__}")
    for name, tensor in state.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise CheckpointError(
                f"{path}: must map names to tensors; {name!r} is {type(tensor).__name__}"
            )
        if tensor.layout != torch.strided or tensor.dtype not in TORCH_CODES:
            raise CheckpointError(
                f"{path}: {name}: {tensor.layout}, {tensor.dtype} tensors are not supported"
            )
    return dict(state), zipped


def _drop_pages(address: int, nbytes: int) -> None:
    """Let the kernel take back the whole pages in a range; they come back from the file.

    Only private file mappings that were never written to may come here: memory of any other kind
    would read as zeros afterwards.
    """
    page = mmap.PAGESIZE
    start = -(-address // page) * page
    end = (address + nbytes) // page * page
    if end > start:
        _libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), _MADV_DONTNEED)
