"""PyTorch `.bin` checkpoints, read by offset; `torch_file` says where their tensors lie."""

import math
from pathlib import Path
from typing import Any

import numpy as np

from endor.checkpoint.directory import Choice, check_index, fingerprint_files, read_config
from endor.checkpoint.sources.contract import SourceTensor
from endor.checkpoint.sources.torch_file import read_state
from endor.checkpoint.sources.torch_pickle import HeldTensor, StoredTensor
from endor.storage.positioned import OpenFiles


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
        self._states: dict[str, dict[str, StoredTensor | HeldTensor]] = {}
        found: dict[str, list[str]] = {}
        for file in choice.files:
            state = self._states[file] = read_state(path / file)
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
        if isinstance(tensor, HeldTensor):
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
