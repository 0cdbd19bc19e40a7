"""The index of a packed checkpoint: which file holds which array, and the source's layout."""

import json
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from endor.checkpoint.directory import PACKED_INDEX_NAME
from endor.checkpoint.sources.contract import SourceTensor
from endor.errors import CheckpointError, ChecksumError, EndorWarning, FormatError
from endor.jsontext import read_object
from endor.storage import FileLayout
from endor.storage.layout import FORMAT_VERSION, VERSIONS, array_key

DEFAULT_DENSE_FILE = "model.safetensors"

SHARD_NAME = re.compile(r"endor-\d{5}-of-\d{5}\.safetensors")

_RESERVED = re.compile(r"endor-\d{5}(-of-\d{5})?\.safetensors")
_MAX_NAME_BYTES = 200


def shard_name(number: int, count: int) -> str:
    """Return the name of shard `number` (from 1) of `count`."""
    return f"endor-{number:05d}-of-{count:05d}.safetensors"


@dataclass(frozen=True, slots=True)
class PackedIndex:
    """A checked `endor.safetensors.index.json`.

    Attributes:
        files: Shards, in order.
        dense_files: Per tensor the dense file that it came from, and goes back to.
        headers: Per shard the checksum of its header; None in an older index.
        companions: What was published besides shards and index; None as `headers`.
    """

    files: tuple[str, ...]
    dense_files: Mapping[str, str]
    headers: Mapping[str, str] | None
    companions: tuple[str, ...] | None


def format_version(layouts: Sequence[FileLayout]) -> int:
    """Return the format version of a checkpoint: the highest of its files'."""
    return max((layout.version for layout in layouts), default=FORMAT_VERSION)


def build_index(
    layouts: Sequence[FileLayout],
    dense_files: Mapping[str, str],
    companions: Iterable[str] | None,
) -> dict[str, Any]:
    """Return the index document of shards with these layouts.

    Args:
        layouts: The shards, in order.
        dense_files: Per tensor the dense file it goes back to.
        companions: What is published besides; None for an index as older versions wrote it.
    """
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
    entry = document["metadata"]["endor"]
    if companions is not None:
        entry["headers"] = {layout.path.name: layout.checksum for layout in layouts}
        entry["companions"] = sorted(companions)
    entry["checksum"] = _checksum(document)
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
    index = _parse(path)
    files = index.files
    missing = [file for file in files if not (directory / file).is_file()]
    if missing:
        raise CheckpointError(
            f"{directory}: {len(missing)} of {len(files)} shards are missing: "
            f"{', '.join(missing[:3])}; copy them again"
        )
    return index


def published_files(path: Path) -> frozenset[str] | None:
    """Return what was published with the index at `path`, itself included; None if not listed.

    Raises:
        CheckpointError, FormatError, ChecksumError: As `read_packed_index`.
    """
    index = _parse(path)
    if index.companions is None:
        return None
    return frozenset((path.name, *index.files, *index.companions))


def check_shards(directory: Path, index: PackedIndex, layouts: Iterable[FileLayout]) -> None:
    """Raise unless the shards are those that the index was written for.

    A header holds the checksums of its records, so its own checksum stands for the whole shard:
    shards of another packing, which are whole in themselves, are noticed here and nowhere else.

    Warns:
        EndorWarning: The index is an older one and holds no checksums of headers.

    Raises:
        ChecksumError: A shard is another one.
    """
    where = directory / PACKED_INDEX_NAME
    if index.headers is None:
        warnings.warn(
            f"{where}: has no checksums of shards, so shards of two checkpoints could be mixed "
            "unnoticed; pack the checkpoint again (endor pack takes packed ones) to add them",
            EndorWarning,
            stacklevel=2,
        )
        return
    for layout in layouts:
        name = layout.path.name
        wanted = index.headers.get(name)
        if layout.checksum != wanted:
            raise ChecksumError(
                f"{where}: does not describe the shards: the header checksum of {name} must be "
                f"{wanted}, got {layout.checksum}; it is the shard of another checkpoint: copy or "
                "convert this one again"
            )


def check_together(layouts: Sequence[FileLayout]) -> None:
    """Raise unless shards belong together, by the index beside them; errors as `check_shards`.

    Raises:
        CheckpointError, FormatError: There is no index, or it is damaged.
    """
    if layouts:
        directory = layouts[0].path.parent
        check_shards(directory, read_packed_index(directory), layouts)


def is_dense_name(name: str) -> bool:
    """Whether a dense file may have this name in an output: never one of Endor's own or a path."""
    return (
        name.endswith((".safetensors", ".gguf"))
        and Path(name).name == name
        and not name.startswith(".")
        and "\0" not in name
        and len(name.encode(errors="replace")) <= _MAX_NAME_BYTES
        and not _RESERVED.fullmatch(name)
    )


def dense_file_names(tensors: Iterable[SourceTensor]) -> dict[str, str]:
    """Return per tensor the name of the dense file to unpack it to: the source's, made plain."""
    given = {tensor.name: tensor.file for tensor in tensors}
    taken = {file for file in given.values() if is_dense_name(file)}
    names = {file: file for file in taken}
    for file in sorted(set(given.values()) - taken):
        stem = file.removesuffix(".safetensors").replace("/", "-").lstrip(".")[:100]
        stem = f"dense-{stem}" if _RESERVED.fullmatch(f"{stem}.safetensors") else stem or "dense"
        number = 1
        while (name := f"{stem}{f'-{number}' if number > 1 else ''}.safetensors") in taken:
            number += 1
        taken.add(name)
        names[file] = name
    return {name: names[file] for name, file in given.items()}


def _parse(path: Path) -> PackedIndex:
    """Return the index at `path`, its checksum and its names checked; not whether shards exist."""
    document = read_object(path)
    try:
        entry = document["metadata"]["endor"]
        version, names = entry["format_version"], entry["dense_files"]
        places, weight_map = entry["dense_file_of"], document["weight_map"]
        recorded = entry["checksum"]
        headers, companions = entry.get("headers"), entry.get("companions")
        dense_files = {name: names[place] for name, place in places.items()}
        files = tuple(sorted(set(weight_map.values())))
        if not all(isinstance(name, str) for name in (*files, *names)):
            raise TypeError("names must be strings")
        if headers is not None and headers.keys() != set(files):
            raise TypeError("weight_map and headers name different shards")
        if companions is not None and not all(is_relative(name) for name in companions):
            raise KeyError("companions")
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        raise FormatError(
            f"{path}: malformed index ({error!r}); restore or re-make the checkpoint"
        ) from None
    if version not in VERSIONS:
        raise FormatError(
            f"{path}: format version must be {VERSIONS[0]} to {VERSIONS[-1]}, got {version}; "
            "upgrade endor"
        )
    odd = [file for file in files if not SHARD_NAME.fullmatch(file)]
    if odd:
        raise FormatError(
            f"{path}: shards must be named endor-NNNNN-of-NNNNN.safetensors, got {odd[0]!r}; "
            "restore or re-make the checkpoint"
        )
    odd = [name for name in names if not is_dense_name(name)]
    if odd:
        raise FormatError(
            f"{path}: dense files must be named *.safetensors or *.gguf, without a directory and "
            f"unlike Endor's own, got {odd[0]!r}; restore or re-make the checkpoint"
        )
    found = _checksum(document)
    if found != recorded:
        raise ChecksumError(
            f"{path}: index checksum must be {recorded}, got {found}; the index is damaged: "
            "restore or re-make the checkpoint"
        )
    return PackedIndex(
        files, dense_files, headers, None if companions is None else tuple(companions)
    )


def is_relative(name: str) -> bool:
    """Whether a name stays below the directory it is relative to."""
    parts = name.split("/")
    return "\0" not in name and all(part not in ("", ".", "..") for part in parts)


def _checksum(document: Mapping[str, Any]) -> str:
    """Return a hash of all of a document's content but the recorded hash, blind to formatting."""
    metadata = document["metadata"]
    entry = {key: value for key, value in metadata["endor"].items() if key != "checksum"}
    plain = {**document, "metadata": {**metadata, "endor": entry}}
    text = json.dumps(plain, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return xxhash.xxh3_64_hexdigest(text.encode())
