"""Checkpoints on disk as a `CheckpointSource`: opened, checked, and read tensor by tensor.

`directory` says which files make one up. Everything is checked on opening (index against shards,
shards against their headers and sizes), so that a conversion does not fail half way on its input.
"""

from pathlib import Path

from endor.checkpoint.directory import CONFIG_NAME, Choice, choose
from endor.checkpoint.sources.bitmask import BitmaskSource, has_bitmasks
from endor.checkpoint.sources.contract import CheckpointSource
from endor.checkpoint.sources.gguf import MAGIC, GgufSource
from endor.checkpoint.sources.packed import PackedSource
from endor.checkpoint.sources.safetensors import SafetensorsSource
from endor.checkpoint.sources.torch import TorchSource
from endor.errors import CheckpointError
from endor.foreign import describe_directory, describe_file


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
        if is_gguf(path):
            return GgufSource(path)
        described = describe_file(path)
        if described is not None:
            raise CheckpointError(f"{path}: {described}")
        return _from_safetensors(path, None, Choice("safetensors", (path.name,), None, {}))
    if not path.is_dir():
        raise CheckpointError(f"{path}: {_NOTHING}")
    if (path / "snapshots").is_dir() and not (path / CONFIG_NAME).exists():
        raise CheckpointError(f"{path}: {describe_directory(path)}")
    choice = choose(path)
    if choice.kind == "packed":
        return PackedSource(path)
    if choice.kind == "torch":
        return TorchSource(path, choice)
    return _from_safetensors(path, path, choice)


_NOTHING = (
    "no such checkpoint; give a directory with config.json and weights, a .safetensors file, a "
    ".gguf file, or the id of a model on the Hub (org/name)"
)


def is_gguf(path: Path) -> bool:
    """Whether a file is one of llama.cpp's, and not the beginning of one alone."""
    with path.open("rb") as file:
        return file.read(len(MAGIC)) == MAGIC


def _from_safetensors(path: Path, directory: Path | None, choice: Choice) -> CheckpointSource:
    source = SafetensorsSource(path, directory, choice)
    return BitmaskSource(source) if has_bitmasks(source) else source
