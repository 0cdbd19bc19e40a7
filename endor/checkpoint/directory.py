"""Which files of a directory are the model: those that transformers would load, in its order.

1. what config.json names as `transformers_weights`
2. `model.safetensors`
3. `model.safetensors.index.json` and its shards
4. `pytorch_model.bin`
5. `pytorch_model.bin.index.json` and its shards
6. a lone `*.safetensors` of another name, which transformers would not find

Where config.json is of diffusers (`_class_name`), its names and its order take the place of 2 to 5.
A packed directory (its config.json says so) goes before all of these. Whatever else looks like
weights is named in a warning and left alone. An index is compared with the shards that it lists.
"""

import hashlib
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from endor.errors import CheckpointError, EndorWarning
from endor.foreign import describe_directory
from endor.jsontext import read_object

CONFIG_NAME = "config.json"
PACKED_INDEX_NAME = "endor.safetensors.index.json"
SAFETENSORS_NAME = "model.safetensors"
SAFETENSORS_INDEX_NAME = "model.safetensors.index.json"
TORCH_NAME = "pytorch_model.bin"
TORCH_INDEX_NAME = "pytorch_model.bin.index.json"

DIFFUSION_NAME = "diffusion_pytorch_model.safetensors"
DIFFUSION_INDEX_NAME = "diffusion_pytorch_model.safetensors.index.json"
DIFFUSION_TORCH_NAME = "diffusion_pytorch_model.bin"
DIFFUSION_NAMES = (DIFFUSION_INDEX_NAME, DIFFUSION_NAME, DIFFUSION_TORCH_NAME)
"""What diffusers calls the weights of a model, in the order in which it looks."""

STANDARD_NAMES = (SAFETENSORS_NAME, SAFETENSORS_INDEX_NAME, TORCH_NAME, TORCH_INDEX_NAME)
EXPLICIT_KEY = "transformers_weights"

COMPUTED = frozenset(["inv_freq", "original_inv_freq", "cos_cached", "sin_cached", "position_ids"])
COMPUTED |= frozenset(["masked_bias", "num_batches_tracked", "_extra_state"])
"""Last parts of names of buffers that models compute themselves: their absence changes nothing."""

_INDEX_SUFFIX = ".index.json"
_WEIGHT_SUFFIXES = {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf"}
_TRAINER_STEMS = {"training_args", "optimizer", "scheduler", "scaler", "random_states"}
_LISTED = 3

Kind = Literal["safetensors", "torch", "packed"]


@dataclass(frozen=True, slots=True)
class Choice:
    """The weight files of a checkpoint.

    Attributes:
        kind: What they are.
        files: Paths relative to the directory, in order; for a packed one none.
        index: The file that lists them, or None.
        weight_map: What the index says: file per tensor name; empty without an index.
    """

    kind: Kind
    files: tuple[str, ...]
    index: Path | None
    weight_map: dict[str, str]


def choose(directory: Path) -> Choice:
    """Return which files of `directory` are the model; warns about what is left alone.

    Raises:
        CheckpointError: There is no model, an index is malformed, or a shard is missing.
    """
    config = read_config(directory)
    packed = (directory / PACKED_INDEX_NAME).exists()
    section = (config or {}).get("quantization_config")
    marked = isinstance(section, dict) and section.get("quant_method") == "endor"
    if packed and (marked or config is None):
        return Choice("packed", (), None, {})
    explicit = (config or {}).get(EXPLICIT_KEY)
    if explicit is not None:
        return _explicit(directory, explicit)
    names = DIFFUSION_NAMES if is_diffusion(config) else STANDARD_NAMES
    name = next((name for name in names if (directory / name).exists()), None)
    if name is None and packed:
        return Choice("packed", (), None, {})
    choice = _lone(directory) if name is None else _named(directory, name)
    _warn_about_the_rest(directory, choice)
    return choice


def is_diffusion(config: Mapping[str, Any] | None) -> bool:
    """Whether a config.json is that of a model of diffusers."""
    return isinstance((config or {}).get("_class_name"), str)


def read_config(directory: Path | None) -> dict[str, Any] | None:
    """Return config.json of `directory`; None when there is none."""
    if directory is None or not (directory / CONFIG_NAME).exists():
        return None
    return read_object(directory / CONFIG_NAME, lenient=True)


def read_index(path: Path) -> dict[str, str]:
    """Return the `weight_map` of an index: the file of each tensor, relative to the index.

    Raises:
        CheckpointError: The index is malformed, or a shard is missing.
    """
    weight_map = read_object(path, lenient=True).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(
            f"{path}: weight_map must map tensor names to files; fetch the index again"
        )
    files: set[str] = set()
    for name, file in weight_map.items():
        if not isinstance(file, str) or not _is_inside(file):
            raise CheckpointError(
                f"{path}: {name}: must map to a file beside the index or below it, got {file!r}"
            )
        files.add(file)
    missing = [file for file in sorted(files) if not (path.parent / file).is_file()]
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise CheckpointError(
            f"{path}: {len(missing)} of {len(files)} shards are missing: "
            f"{', '.join(missing[:3])}{more}; finish the download"
        )
    return dict(weight_map)


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


def warn(message: str) -> None:
    """Tell the caller of the library something that changes no weight."""
    warnings.warn(message, EndorWarning, stacklevel=2)


def _named(directory: Path, name: str) -> Choice:
    torch_names = (TORCH_NAME, TORCH_INDEX_NAME, DIFFUSION_TORCH_NAME)
    kind: Kind = "torch" if name in torch_names else "safetensors"
    if not name.endswith(_INDEX_SUFFIX):
        return Choice(kind, (name,), None, {})
    index = directory / name
    weight_map = read_index(index)
    files = tuple(sorted(set(weight_map.values())))
    if kind == "safetensors" and not all(file.endswith(".safetensors") for file in files):
        odd = next(file for file in files if not file.endswith(".safetensors"))
        raise CheckpointError(f"{index}: must list .safetensors files, got {odd!r}")
    return Choice(kind, files, index, weight_map)


def _explicit(directory: Path, name: Any) -> Choice:
    good = isinstance(name, str) and name.endswith((".safetensors", ".safetensors.index.json"))
    if not good or not _is_inside(name):
        raise CheckpointError(
            f"{directory / CONFIG_NAME}: {EXPLICIT_KEY} must name a safetensors file or index in "
            f"the directory, got {name!r}"
        )
    if not (directory / name).is_file():
        raise CheckpointError(
            f"{directory / name}: no such file, though {CONFIG_NAME} names it as {EXPLICIT_KEY}; "
            "finish the download"
        )
    choice = _named(directory, name)
    _warn_about_the_rest(directory, choice)
    return choice


def _lone(directory: Path) -> Choice:
    found = sorted(path.name for path in directory.glob("*.safetensors"))
    foreign = [name for name in found if not name.startswith("adapter_model")]
    if len(foreign) == 1:
        warn(
            f"{directory}: takes {foreign[0]}, the only safetensors file; transformers would look "
            f"for {SAFETENSORS_NAME}"
        )
        return Choice("safetensors", (foreign[0],), None, {})
    if foreign:
        raise CheckpointError(
            f"{directory}: {len(foreign)} safetensors files ({_list(foreign)}) but neither "
            f"{SAFETENSORS_NAME} nor {SAFETENSORS_INDEX_NAME}; add the index, or give one file"
        )
    described = describe_directory(directory)
    if described is not None:
        raise CheckpointError(f"{directory}: {described}")
    raise CheckpointError(
        f"{directory}: no weights here; expected {', '.join(STANDARD_NAMES[:-1])} or "
        f"{STANDARD_NAMES[-1]}"
    )


def is_adapter(path: Path) -> bool:
    """Whether a file holds an adapter that transformers applies to the model beside it.

    It does where the adapter's config is there too; one without the other is an error to it.
    """
    return path.stem == "adapter_model" and path.with_name("adapter_config.json").is_file()


def _warn_about_the_rest(directory: Path, choice: Choice) -> None:
    stale = choice.index is None and choice.files == (SAFETENSORS_NAME,)
    if stale and (directory / SAFETENSORS_INDEX_NAME).exists():
        warn(
            f"{directory}: takes {SAFETENSORS_NAME}, as transformers does, though "
            f"{SAFETENSORS_INDEX_NAME} is there too; remove the stale one of the two"
        )
    rest = sorted(
        path.name
        for path in directory.iterdir()
        if path.suffix.lower() in _WEIGHT_SUFFIXES
        and path.name not in choice.files
        and path.stem.partition("-")[0] not in _TRAINER_STEMS
        and not path.name.startswith(("rng_state", "."))
        and not is_adapter(path)
        and path.is_file()
    )
    rest += ["original/"] if (directory / "original").is_dir() else []
    if rest:
        what = f"{choice.index.name} and its shards" if choice.index else choice.files[0]
        warn(f"{directory}: takes {what}; leaves alone {_list(rest)}")


def _list(names: list[str]) -> str:
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more


def _is_inside(file: str) -> bool:
    """Whether a relative path stays below the directory that it is relative to."""
    path = PurePosixPath(file)
    return bool(
        path.parts
        and not path.is_absolute()
        and ".." not in path.parts
        and "\0" not in file
        and str(path) == file
    )
