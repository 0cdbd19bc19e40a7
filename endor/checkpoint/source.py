"""Checkpoints on disk as a `CheckpointSource`: which files make one up, and its dense tensors.

Taken, in this order: `model.safetensors`, `model.safetensors.index.json`, a packed directory,
a lone `*.safetensors`, `pytorch_model.bin`, `pytorch_model.bin.index.json`; or one safetensors
file. Everything is checked on opening (index against shards, shards against their headers and
sizes), so that a conversion does not fail half way on its input.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from endor.checkpoint.files import Extent, ReadOnlyFile, read_header
from endor.checkpoint.tensors import CheckpointSource, SourceTensor
from endor.errors import CheckpointError

CONFIG_NAME = "config.json"
PACKED_INDEX_NAME = "endor.safetensors.index.json"
SAFETENSORS_NAME = "model.safetensors"
SAFETENSORS_INDEX_NAME = "model.safetensors.index.json"
TORCH_NAME = "pytorch_model.bin"
TORCH_INDEX_NAME = "pytorch_model.bin.index.json"


def open_source(path: Path | str) -> CheckpointSource:
    """Return the checkpoint at `path`: a Hugging Face directory, a packed one, or one file.

    Raises:
        CheckpointError: there is none, or it is incomplete or contradicts itself.
    """
    source = _open(Path(path))
    if not source.tensors:
        source.close()
        raise CheckpointError(f"{path}: holds no tensors")
    return source


def _open(path: Path) -> CheckpointSource:
    if path.is_file():
        return _from_safetensors(path, None, _single(path))
    if not path.is_dir():
        raise CheckpointError(
            f"{path}: no such checkpoint; give a directory with config.json and weights, "
            "or a .safetensors file (download from the Hub first: hf download MODEL --local-dir D)"
        )
    if (path / SAFETENSORS_NAME).exists():
        return _from_safetensors(path, path, _single(path / SAFETENSORS_NAME))
    if (path / SAFETENSORS_INDEX_NAME).exists():
        return _from_safetensors(path, path, _sharded(path / SAFETENSORS_INDEX_NAME))
    if (path / PACKED_INDEX_NAME).exists():
        from endor.checkpoint.packed import PackedSource

        return PackedSource(path)
    lone = sorted(path.glob("*.safetensors"))
    if len(lone) == 1:
        return _from_safetensors(path, path, _single(lone[0]))
    if lone:
        raise CheckpointError(
            f"{path}: {len(lone)} safetensors files but no {SAFETENSORS_INDEX_NAME}; "
            "add the index, or give one file"
        )
    for name, sharded in ((TORCH_NAME, False), (TORCH_INDEX_NAME, True)):
        if (path / name).exists():
            from endor.checkpoint.torchfiles import TorchSource

            return TorchSource(path, read_index(path / name) if sharded else {name: None})
    raise CheckpointError(
        f"{path}: no weights here; expected {SAFETENSORS_NAME}, {SAFETENSORS_INDEX_NAME}, "
        f"{TORCH_NAME} or {TORCH_INDEX_NAME}"
    )


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in `path`.

    Raises:
        CheckpointError: it is missing or not a JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file; is the checkpoint complete?") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: must be JSON: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: must hold a JSON object, got {type(value).__name__}")
    return value


def read_config(directory: Path | None) -> dict[str, Any] | None:
    """Return config.json of `directory`; None when there is none."""
    if directory is None or not (directory / CONFIG_NAME).exists():
        return None
    return read_json(directory / CONFIG_NAME)


def read_index(path: Path) -> dict[str, frozenset[str] | None]:
    """Return the tensor names that an index file expects in each of its shards.

    Raises:
        CheckpointError: the index is malformed, or a shard is missing.
    """
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path}: weight_map must map tensor names to files")
    names: dict[str, set[str]] = {}
    for name, file in weight_map.items():
        if not isinstance(file, str) or not file or Path(file).name != file:
            raise CheckpointError(f"{path}: {name}: must map to a file beside it, got {file!r}")
        names.setdefault(file, set()).add(name)
    missing = [file for file in sorted(names) if not (path.parent / file).is_file()]
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise CheckpointError(
            f"{path}: {len(missing)} of {len(names)} shards are missing: "
            f"{', '.join(missing[:3])}{more}; finish the download"
        )
    return {file: frozenset(names[file]) for file in sorted(names)}


def check_names(path: Path, found: Mapping[str, object], expected: frozenset[str] | None) -> None:
    """Raise `CheckpointError` unless a shard holds exactly what the index says."""
    if expected is None:
        return
    for name in sorted(expected - found.keys()):
        raise CheckpointError(f"{path}: the index puts {name} here, the file lacks it")
    for name in sorted(found.keys() - expected):
        raise CheckpointError(f"{path}: holds {name}, which the index does not put here")


def fingerprint_files(paths: list[Path]) -> str:
    """Return a hash over names, sizes and modification times: cheap, and changes with the files."""
    digest = hashlib.sha256()
    for path in paths:
        stat = path.stat()
        digest.update(f"{path.name}\0{stat.st_size}\0{stat.st_mtime_ns}\0".encode())
    return digest.hexdigest()


class SafetensorsSource:
    """Stock safetensors files, read by offset."""

    ordered = False

    def __init__(self, path: Path, directory: Path | None, files: dict[Path, dict[str, Extent]]):
        self.path = path
        self.directory = directory
        self.tensors: dict[str, SourceTensor] = {}
        self._paths = list(files)
        self._files: dict[str, ReadOnlyFile] = {}
        self._offsets: dict[str, int] = {}
        for file, extents in files.items():
            self._files[file.name] = ReadOnlyFile(file)
            for name, extent in extents.items():
                if name in self.tensors:
                    raise CheckpointError(
                        f"{path}: {name} is both in {self.tensors[name].file} and {file.name}"
                    )
                self.tensors[name] = SourceTensor(name, extent.dtype, extent.shape, file.name)
                self._offsets[name] = extent.offset

    def read_into(self, name: str, out: np.ndarray) -> None:
        self._files[self.tensors[name].file].read_into(self._offsets[name], out)

    def config(self) -> dict[str, Any] | None:
        return read_config(self.directory)

    def fingerprint(self) -> str:
        return fingerprint_files(self._paths)

    def close(self) -> None:
        for file in self._files.values():
            file.close()


def _single(path: Path) -> dict[Path, frozenset[str] | None]:
    return {path: None}


def _sharded(index: Path) -> dict[Path, frozenset[str] | None]:
    return {index.parent / file: names for file, names in read_index(index).items()}


def _from_safetensors(
    path: Path, directory: Path | None, files: dict[Path, frozenset[str] | None]
) -> CheckpointSource:
    from endor.checkpoint.bitmask import BitmaskSource, has_bitmasks

    extents: dict[Path, dict[str, Extent]] = {}
    for file, expected in files.items():
        header = read_header(file)
        if "endor" in header.metadata:
            raise CheckpointError(
                f"{file}: is packed by Endor; give its whole directory (with {PACKED_INDEX_NAME})"
            )
        check_names(file, header.tensors, expected)
        extents[file] = dict(header.tensors)
    source = SafetensorsSource(path, directory, extents)
    return BitmaskSource(source) if has_bitmasks(source) else source
