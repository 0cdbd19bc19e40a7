"""A packed checkpoint seen as a dense one: what unpacking, comparing and re-packing read."""

import hashlib
import threading
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np

from endor import kernels
from endor.checkpoint.companions import dense_config
from endor.checkpoint.directory import read_config
from endor.checkpoint.index import DEFAULT_DENSE_FILE, check_shards, read_packed_index
from endor.checkpoint.sources.contract import SourceTensor
from endor.codecs import Encoded
from endor.errors import FormatError
from endor.storage import FileLayout, HostBuffer, Record, bind_checked, check_bytes, open_reader

CACHED_RECORDS = 2
"""The tensors of one record are asked for one after the other, by more than one thread."""


class PackedSource:
    """The dense tensors of a packed checkpoint, decoded while they are read.

    Every record's checksum and every tensor's structure is checked before its kernel runs.
    """

    ordered = False

    def __init__(self, path: Path) -> None:
        self.path = path
        self.directory: Path | None = path
        index = read_packed_index(path)
        self.layouts = [FileLayout.read(path / file) for file in index.files]
        check_shards(path, index, self.layouts)
        self.tensors: dict[str, SourceTensor] = {}
        self._homes: dict[str, FileLayout] = {}
        for layout in self.layouts:
            for name, entry in layout.tensors.items():
                if name in self.tensors:
                    raise FormatError(
                        f"{path}: {name} is both in {self._homes[name].path.name} and "
                        f"{layout.path.name}; restore or re-make the checkpoint"
                    )
                file = index.dense_files.get(name, DEFAULT_DENSE_FILE)
                self.tensors[name] = SourceTensor(name, entry.spec.dtype, entry.spec.shape, file)
                self._homes[name] = layout
        self._reader = open_reader()
        self._lock = threading.Lock()
        self._cache: OrderedDict[tuple[Path, str], np.ndarray] = OrderedDict()

    def read_into(self, name: str, out: np.ndarray) -> None:
        encoded = self.encoded(name)
        kernels.decode(encoded, out.view(encoded.spec.dtype.uint), threads=1)

    def encoded(self, name: str) -> Encoded:
        """Return a tensor as it is stored, its record's checksum checked."""
        layout = self._homes[name]
        record = layout.records[layout.tensors[name].record]
        return bind_checked(layout, name, self._record_bytes(record))

    def _record_bytes(self, record: Record) -> np.ndarray:
        key = (record.path, record.name)
        with self._lock:
            found = self._cache.get(key)
            if found is None:
                buffer = HostBuffer(record.nbytes)
                self._reader.read(record, buffer)
                check_bytes(record, buffer.array)
                found = self._cache[key] = buffer.array
                while len(self._cache) > CACHED_RECORDS:
                    self._cache.popitem(last=False)
            return found

    def config(self) -> dict[str, Any] | None:
        return dense_config(read_config(self.directory), self.path)

    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        for layout in self.layouts:
            for record in layout.records.values():
                digest.update(f"{record.name}\0{record.checksum}\0".encode())
        return digest.hexdigest()

    def close(self) -> None:
        self._reader.close()
        self._cache.clear()
