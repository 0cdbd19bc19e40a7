"""The index of a packed checkpoint: which file holds which array, and the source's layout."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from endor.checkpoint.source import PACKED_INDEX_NAME, read_json
from endor.checkpoint.tensors import SourceTensor
from endor.errors import CheckpointError, ChecksumError, FormatError
from endor.storage import FileLayout
from endor.storage.layout import FORMAT_VERSION, VERSIONS, array_key

DEFAULT_DENSE_FILE = "model.safetensors"


def shard_name(number: int, count: int) -> str:
    """Return the name of shard `number` (from 1) of `count`."""
    return f"endor-{number:05d}-of-{count:05d}.safetensors"


@dataclass(frozen=True, slots=True)
class PackedIndex:
    """A checked `endor.safetensors.index.json`.

    Attributes:
        files: Shards, in order.
        dense_files: Per tensor the dense file that it came from, and goes back to.
    """

    files: tuple[str, ...]
    dense_files: Mapping[str, str]


def format_version(layouts: Sequence[FileLayout]) -> int:
    """Return the format version of a checkpoint: the highest of its files'."""
    return max((layout.version for layout in layouts), default=FORMAT_VERSION)


def build_index(layouts: Sequence[FileLayout], dense_files: Mapping[str, str]) -> dict[str, Any]:
    """Return the index document of shards with these layouts."""
    weight_map: dict[str, str] = {}
    total = 0
    for layout in layouts:
        for tensor in layout.tensors.values():
            for array in tensor.arrays:
                weight_map[array_key(tensor.name, array.suffix)] = layout.path.name
                total += array.nbytes
    names = [name for layout in layouts for name in layout.tensors]
    files = sorted({dense_files[name] for name in names})
    places = {file: number for number, file in enumerate(files)}
    document: dict[str, Any] = {
        "metadata": {
            "total_size": total,
            "endor": {
                "format_version": format_version(layouts),
                "dense_files": files,
                "dense_file_of": {name: places[dense_files[name]] for name in names},
            },
        },
        "weight_map": weight_map,
    }
    document["metadata"]["endor"]["checksum"] = _checksum(document)
    return document


def index_text(document: Mapping[str, Any]) -> bytes:
    """Return an index document as it is written."""
    return (json.dumps(document, indent=1, ensure_ascii=False) + "\n").encode()


def read_packed_index(directory: Path) -> PackedIndex:
    """Return the index of a packed checkpoint.

    Raises:
        CheckpointError: the directory has no index, or lacks a shard.
        FormatError: the index is malformed, or of a version that this library does not know.
        ChecksumError: its content was changed.
    """
    path = directory / PACKED_INDEX_NAME
    if not directory.is_dir() or not path.exists():
        raise CheckpointError(
            f"{directory}: no packed checkpoint here ({PACKED_INDEX_NAME} is missing); "
            "make one with: endor pack MODEL OUT"
        )
    document = read_json(path)
    try:
        entry = document["metadata"]["endor"]
        version, names = entry["format_version"], entry["dense_files"]
        places, weight_map = entry["dense_file_of"], document["weight_map"]
        recorded = entry["checksum"]
        dense_files = {name: names[place] for name, place in places.items()}
        files = tuple(sorted(set(weight_map.values())))
        plain = all(Path(file).name == file for file in (*files, *names))
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        raise FormatError(
            f"{path}: malformed index ({error!r}); restore or re-make the checkpoint"
        ) from None
    if version not in VERSIONS:
        raise FormatError(
            f"{path}: format version must be {VERSIONS[0]} or {VERSIONS[-1]}, got {version}; "
            "upgrade endor"
        )
    if not plain:
        raise FormatError(f"{path}: file names must not contain a directory")
    found = _checksum(document)
    if found != recorded:
        raise ChecksumError(
            f"{path}: index checksum must be {recorded}, got {found}; the index is damaged: "
            "restore or re-make the checkpoint"
        )
    missing = [file for file in files if not (directory / file).is_file()]
    if missing:
        raise CheckpointError(
            f"{directory}: {len(missing)} of {len(files)} shards are missing: "
            f"{', '.join(missing[:3])}; copy them again"
        )
    return PackedIndex(files, dense_files)


def dense_file_names(tensors: Iterable[SourceTensor]) -> dict[str, str]:
    """Return per tensor the name of the dense file to unpack it to."""
    return {tensor.name: tensor.file for tensor in tensors}


def _checksum(document: Mapping[str, Any]) -> str:
    """Return a hash of all of a document's content but the recorded hash, blind to formatting."""
    metadata = document["metadata"]
    entry = {key: value for key, value in metadata["endor"].items() if key != "checksum"}
    plain = {**document, "metadata": {**metadata, "endor": entry}}
    text = json.dumps(plain, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return xxhash.xxh3_64_hexdigest(text.encode())
