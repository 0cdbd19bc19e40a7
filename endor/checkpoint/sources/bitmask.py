"""compressed-tensors checkpoints in the `sparse-bitmask` format, seen as dense ones.

A weight X is stored there as `X.shape` (int64), `X.compressed` (its non-zeros, row-major, in its
own element type), `X.bitmask` (uint8 `(rows, ceil(cols / 8))`, least significant bit first) and
`X.row_offsets` (int64, redundant). -0.0 was lost when such a file was written.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from endor.checkpoint.sources.contract import SourceTensor
from endor.checkpoint.sources.safetensors import SafetensorsSource
from endor.errors import CheckpointError

PARTS = ("shape", "compressed", "bitmask", "row_offsets")
CHUNK = 1 << 22
"""Weights expanded at a time: bounds the unpacked mask to this many bytes."""


def bitmask_names(names: Mapping[str, object]) -> list[str]:
    """Return the weights that are stored as a bitmask and values."""
    found = []
    for part in names:
        name, _, suffix = part.rpartition(".")
        if suffix == "bitmask" and f"{name}.compressed" in names:
            found.append(name)
    return found


def has_bitmasks(source: SafetensorsSource) -> bool:
    """Whether any tensor of `source` is stored as a bitmask and values."""
    return bool(bitmask_names(source.tensors))


class BitmaskSource:
    """The dense tensors of a sparse-bitmask checkpoint; expanded while they are read."""

    ordered = False

    def __init__(self, stored: SafetensorsSource) -> None:
        self.path = stored.path
        self.directory = stored.directory
        self._stored = stored
        weights = bitmask_names(stored.tensors)
        parts = {f"{name}.{part}" for name in weights for part in PARTS}
        self.tensors: dict[str, SourceTensor] = {
            name: tensor for name, tensor in stored.tensors.items() if name not in parts
        }
        self._sparse = frozenset(weights)
        for name in weights:
            if name in self.tensors:
                raise CheckpointError(f"{self.path}: {name} is there both dense and as a bitmask")
            self.tensors[name] = self._describe(name)

    def _describe(self, name: str) -> SourceTensor:
        tensors = self._stored.tensors
        if f"{name}.shape" not in tensors:
            raise CheckpointError(f"{self.path}: {name}.shape is missing beside {name}.bitmask")
        stored_shape = tensors[f"{name}.shape"]
        if stored_shape.dtype.name != "I64" or len(stored_shape.shape) != 1:
            raise CheckpointError(f"{self.path}: {name}.shape must be a list of int64")
        shape = tuple(int(size) for size in self._read(f"{name}.shape").view("<i8"))
        values, bitmask = tensors[f"{name}.compressed"], tensors[f"{name}.bitmask"]
        if not shape or min(shape) < 0 or len(values.shape) != 1:
            raise CheckpointError(f"{self.path}: {name}: malformed shape {list(shape)} or values")
        rows, cols = math.prod(shape[:-1]), shape[-1]
        if bitmask.dtype.name != "U8" or bitmask.numel != rows * (-(-cols // 8)):
            raise CheckpointError(
                f"{self.path}: {name}.bitmask must hold {rows} rows of {-(-cols // 8)} bytes, "
                f"got {bitmask.dtype.name} {list(bitmask.shape)}"
            )
        return SourceTensor(name, values.dtype, shape, values.file)

    def _read(self, part: str) -> np.ndarray:
        out = np.empty(self._stored.tensors[part].nbytes, dtype=np.uint8)
        self._stored.read_into(part, out)
        return out

    def read_into(self, name: str, out: np.ndarray) -> None:
        if name not in self._sparse:
            self._stored.read_into(name, out)
            return
        tensor = self.tensors[name]
        uint = tensor.dtype.uint
        values = self._read(f"{name}.compressed").view(uint)
        cols = tensor.shape[-1]
        rows = tensor.numel // cols if cols else 0
        bitmask = self._read(f"{name}.bitmask").reshape(rows, -(-cols // 8)) if rows else None
        dense = out.view(uint).reshape(rows, cols)
        dense[...] = 0
        start, step = 0, max(1, CHUNK // max(cols, 1))
        for row in range(0, rows, step):
            assert bitmask is not None
            bits = np.unpackbits(bitmask[row : row + step], axis=1, bitorder="little")
            if bits[:, cols:].any():
                raise CheckpointError(f"{self.path}: {name}.bitmask has bits past column {cols}")
            mask = bits[:, :cols].view(bool)
            count = int(np.count_nonzero(mask))
            if start + count <= values.size:
                dense[row : row + step][mask] = values[start : start + count]
            start += count
        if start != values.size:
            raise CheckpointError(
                f"{self.path}: {name}.bitmask marks {start} weights, "
                f"{name}.compressed holds {values.size}"
            )

    def config(self) -> dict[str, Any] | None:
        """Return config.json without the sparse format that the dense tensors no longer have."""
        config = self._stored.config()
        if config is None:
            return None
        for key in ("quantization_config", "compression_config"):
            entry = config.get(key)
            if not isinstance(entry, dict) or "sparsity_config" not in entry:
                continue
            entry = {field: value for field, value in entry.items() if field != "sparsity_config"}
            if entry.get("config_groups"):
                config[key] = entry
            else:
                del config[key]
        return config

    def fingerprint(self) -> str:
        return self._stored.fingerprint()

    def close(self) -> None:
        self._stored.close()
