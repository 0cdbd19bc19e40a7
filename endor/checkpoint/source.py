"""Checkpoints on disk as a `CheckpointSource`: opened, checked, and read tensor by tensor.

`choose` says which files make one up. Everything is checked on opening (index against shards,
shards against their headers and sizes), so that a conversion does not fail half way on its input.
"""

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from endor.checkpoint.choose import (
    CONFIG_NAME,
    DIFFUSION_INDEX_NAME,
    DIFFUSION_NAME,
    PACKED_INDEX_NAME,
    SAFETENSORS_INDEX_NAME,
    SAFETENSORS_NAME,
    Choice,
    choose,
    is_diffusion,
    read_config,
    warn,
)
from endor.checkpoint.files import Extent, OpenFiles, read_header
from endor.checkpoint.tensors import CheckpointSource, SourceTensor
from endor.errors import CheckpointError
from endor.foreign import describe_absent, describe_directory, describe_file

__all__ = [
    "CONFIG_NAME",
    "DIFFUSION_INDEX_NAME",
    "DIFFUSION_NAME",
    "PACKED_INDEX_NAME",
    "SAFETENSORS_INDEX_NAME",
    "SAFETENSORS_NAME",
    "SafetensorsSource",
    "check_index",
    "fingerprint_files",
    "is_diffusion",
    "open_source",
    "read_config",
]

COMPUTED = frozenset(["inv_freq", "original_inv_freq", "cos_cached", "sin_cached", "position_ids"])
COMPUTED |= frozenset(["masked_bias", "num_batches_tracked", "_extra_state"])
"""Last parts of names of buffers that models compute themselves: their absence changes nothing."""

_PIECE_BYTES = 16 << 20


def open_source(path: Path | str) -> CheckpointSource:
    """Return the checkpoint at `path`: a Hugging Face directory, a packed one, or one file.

    Warns (`EndorWarning`) about files that are left alone, and about an index that differs from
    its shards in what cannot change a weight.

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
        described = describe_file(path)
        if described is not None:
            raise CheckpointError(f"{path}: {described}")
        return _from_safetensors(path, None, Choice("safetensors", (path.name,), None, {}))
    if not path.is_dir():
        raise CheckpointError(f"{path}: {describe_absent(path) or _NOTHING}")
    if (path / "snapshots").is_dir() and not (path / CONFIG_NAME).exists():
        raise CheckpointError(f"{path}: {describe_directory(path)}")
    choice = choose(path)
    if choice.kind == "packed":
        from endor.checkpoint.packed import PackedSource

        return PackedSource(path)
    if choice.kind == "torch":
        from endor.checkpoint.torchfiles import TorchSource

        return TorchSource(path, choice)
    return _from_safetensors(path, path, choice)


_NOTHING = (
    "no such checkpoint; give a directory with config.json and weights, or a .safetensors file "
    "(download from the Hub first: hf download MODEL --local-dir D)"
)


def check_index(
    directory: Path,
    choice: Choice,
    found: Mapping[str, list[str]],
    equal: Callable[[str, str, str], bool],
) -> dict[str, str]:
    """Return the file to read each tensor from, after comparing the index with its shards.

    transformers loads every tensor of every listed shard, whatever the index says of it. What
    differs without changing a weight is therefore tolerated, with a warning: a tensor that the
    index lists in another shard or not at all, one that lies in two shards with the same bits, and
    a listed one that no shard has, where models compute it themselves or config.json ties it.

    Args:
        directory: The checkpoint.
        choice: Its files and index.
        found: Per tensor name the files that hold it, in the order of `choice.files`.
        equal: Whether a tensor has the same bits in two files.

    Raises:
        CheckpointError: A weight is missing, or lies in two shards with different bits.
    """
    for name, files in found.items():
        for file in files[1:]:
            if not equal(name, files[0], file):
                raise CheckpointError(
                    f"{directory}: {name} is both in {files[0]} and {file}, and differs; remove "
                    "the wrong one"
                )
    homes = {name: files[-1] for name, files in found.items()}
    if choice.index is None:
        return homes
    absent = sorted(choice.weight_map.keys() - found.keys())
    ties = (read_config(directory) or {}).get("tie_word_embeddings") is True
    for name in absent:
        if name.rpartition(".")[2] in COMPUTED or (ties and name == "lm_head.weight"):
            continue
        raise CheckpointError(
            f"{choice.index}: lists {name}, which no shard holds (it should be in "
            f"{choice.weight_map[name]}); a model loaded from it would have made-up weights there: "
            "fetch the shards again, or take the name out of the index"
        )
    unlisted = sorted(found.keys() - choice.weight_map.keys())
    moved = [
        name
        for name, file in choice.weight_map.items()
        if name in found and file not in found[name]
    ]
    twice = [name for name, files in found.items() if len(files) > 1]
    for names, what in (
        (absent, "listed, but in no shard; models compute or tie it"),
        (unlisted, "in a shard, but not listed; taken"),
        (moved, "in another shard than listed; taken from there"),
        (twice, "in two shards with the same bits; taken once"),
    ):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            warn(f"{choice.index}: {min(names)}{more}: {what}")
    return homes


def fingerprint_files(paths: list[Path]) -> str:
    """Return a hash over names, sizes and modification times: cheap, and changes with the files."""
    digest = hashlib.sha256()
    for path in paths:
        stat = path.stat()
        digest.update(f"{path.name}\0{stat.st_size}\0{stat.st_mtime_ns}\0".encode())
    return digest.hexdigest()


class SafetensorsSource:
    """Stock safetensors files, read by offset.

    Args:
        path: The directory or file, for messages.
        directory: Where config.json lies; None for a lone file.
        choice: The weight files, relative to the directory of `path`.
    """

    ordered = False

    def __init__(self, path: Path, directory: Path | None, choice: Choice) -> None:
        self.path = path
        self.directory = directory
        self.tensors: dict[str, SourceTensor] = {}
        self._files = OpenFiles()
        self._places: dict[str, tuple[Path, int]] = {}
        root = path if directory is not None else path.parent
        self._paths = [root / file for file in choice.files]
        extents: dict[str, dict[str, Extent]] = {}
        found: dict[str, list[str]] = {}
        for file in choice.files:
            tensors, metadata = read_header(root / file)
            if "endor" in metadata:
                raise CheckpointError(
                    f"{root / file}: is packed by Endor; give its whole directory (with "
                    f"{PACKED_INDEX_NAME})"
                )
            extents[file] = tensors
            for name in tensors:
                found.setdefault(name, []).append(file)

        def equal(name: str, one: str, other: str) -> bool:
            first, second = extents[one][name], extents[other][name]
            if (first.dtype, first.shape) != (second.dtype, second.shape):
                return False
            return self._same_bytes(root / one, first, root / other, second)

        homes = check_index(root, choice, found, equal)
        for file in choice.files:
            for name, extent in extents[file].items():
                if homes[name] == file:
                    self.tensors[name] = SourceTensor(name, extent.dtype, extent.shape, file)
                    self._places[name] = (root / file, extent.offset)

    def _same_bytes(self, one: Path, first: Extent, other: Path, second: Extent) -> bool:
        for at in range(0, first.nbytes, _PIECE_BYTES):
            pieces = []
            for path, extent in ((one, first), (other, second)):
                piece = np.empty(min(_PIECE_BYTES, extent.nbytes - at), dtype=np.uint8)
                self._files.read_into(path, extent.offset + at, piece)
                pieces.append(piece)
            if not np.array_equal(pieces[0], pieces[1]):
                return False
        return True

    def read_into(self, name: str, out: np.ndarray) -> None:
        path, offset = self._places[name]
        self._files.read_into(path, offset, out)

    def config(self) -> dict[str, Any] | None:
        return read_config(self.directory)

    def fingerprint(self) -> str:
        return fingerprint_files(self._paths)

    def close(self) -> None:
        self._files.close()


def _from_safetensors(path: Path, directory: Path | None, choice: Choice) -> CheckpointSource:
    from endor.checkpoint.bitmask import BitmaskSource, has_bitmasks

    source = SafetensorsSource(path, directory, choice)
    return BitmaskSource(source) if has_bitmasks(source) else source
