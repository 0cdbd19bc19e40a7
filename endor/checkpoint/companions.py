"""What belongs to a checkpoint besides weights: config, tokenizer, templates, licence, code.

All files beside the weights, and the folders that its config files name, whole. Weights of other
kinds (another precision, another framework) are left out and reported; those of an adapter that
lies beside the model are carried over as they are.

A link is followed only inside the checkpoint, and into the blobs of the hub cache that holds it.
Anything else would let a downloaded checkpoint pick files of this machine for the output, which
people upload.
"""

import json
import os
import re
import shutil
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from endor.checkpoint.directory import CONFIG_NAME, is_adapter
from endor.checkpoint.index import SHARD_NAME
from endor.checkpoint.sources.contract import CheckpointSource
from endor.errors import CheckpointError, EndorError
from endor.jsontext import parse
from endor.storage.layout import FORMAT_VERSION

COUNTS_NAME = "endor.neurons.safetensors"
PREDICTORS_NAME = "endor.predictors.safetensors"

OF_SHARDS = frozenset({COUNTS_NAME, PREDICTORS_NAME})
"""Files that say something of the shards beside them, and of no others."""

QUANTIZATION_KEY = "quantization_config"
SOURCE_QUANTIZATION_KEY = "source_quantization_config"
TEMPLATE_DIRECTORY = "additional_chat_templates"

MAX_COMPANION_BYTES = 1 << 29
"""A larger file is no companion, whatever its name; the largest tokenizers have 40 MB."""

_WEIGHTS = re.compile(
    r"\.(safetensors|bin|pt|pth|pt2|ckpt|gguf|ggml|h5|hdf5|keras|msgpack|onnx|onnx[._]data|npy|npz"
    r"|ot|tflite|pdparams|pdiparams|pdmodel|pkl|pickle|joblib|nemo|mlmodel|engine|plan|trt|llamafile"
    r"|pb|params|pte|mar|distcp|zip|tar|t[gbx]z|gz|bz2|xz|zst|7z|rar)$|\.data-\d+-of-\d+$",
    re.IGNORECASE,
)
_WEIGHT_INDEX = re.compile(r"\.index(\.[^.]+)*\.json$", re.IGNORECASE)
_NO_CONFIG = re.compile(r"(tokenizer|vocab|added_tokens|tekken)\.json")
_MAX_CONFIG_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Companions:
    """What is carried over from a checkpoint.

    Attributes:
        files: Relative name in the output to the file that is copied, all links resolved.
        left_out: Names of other weights and of folders that no config names.
    """

    files: Mapping[str, Path]
    left_out: tuple[str, ...]

    @property
    def code(self) -> tuple[str, ...]:
        """Names of the files of Python code among `files`."""
        return tuple(sorted(name for name in self.files if name.endswith(".py")))


def is_weights(name: str) -> bool:
    """Whether a file's name says that it holds weights."""
    return bool(_WEIGHTS.search(name))


def find_companions(source: CheckpointSource) -> Companions:
    """Return what to carry over besides config.json.

    Raises:
        CheckpointError: A link leads out of the checkpoint.
    """
    root = source.directory
    if root is None:
        return Companions({}, ())
    follow(root / CONFIG_NAME, root)
    files: dict[str, Path] = {}
    left_out: list[str] = []
    folders: list[Path] = []
    own = _weight_files(source)
    for path in sorted(root.iterdir()):
        if path.name.startswith(".") or path.name == CONFIG_NAME:
            continue
        if path.is_dir():
            folders.append(path)
        elif _WEIGHT_INDEX.search(path.name) or not path.is_file():
            continue
        elif is_adapter(path):
            files[path.name] = follow(path, root)
        elif _WEIGHTS.search(path.name) or path.stat().st_size > MAX_COMPANION_BYTES:
            left_out += [path.name] if path.name not in own else []
        else:
            files[path.name] = follow(path, root)
    named = _named_folders(root, files)
    for folder in folders:
        if folder.name in named and not _WEIGHTS.search(folder.name):
            files |= files_below(folder, root)
        else:
            left_out.append(f"{folder.name}/")
    for name in [name for name in files if not _is_unicode(name)]:
        del files[name]  # no index and no journal could name it
        left_out.append(name)
    shown = (name.encode(errors="backslashreplace").decode() for name in left_out)
    return Companions(files, tuple(sorted(shown)))


def planned_files(
    companions: Companions, config: Mapping[str, Any] | None, *others: str
) -> dict[str, Path | None]:
    """Return what an output will hold besides shards; where a name has a path, it is copied."""
    written = (*others, *(() if config is None else (CONFIG_NAME,)))
    return {**companions.files, **dict.fromkeys(written)}


def copy_companions(companions: Companions, target: Path, config: Mapping[str, Any] | None) -> None:
    """Copy `companions` to `target`, and write `config` there.

    Raises:
        OSError: From the file system, naming the file.
    """
    if config is not None:
        text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
        (target / CONFIG_NAME).write_text(text, encoding="utf-8")
    for name, path in companions.files.items():
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        # Checked again on the open file: it may have become a link or a pipe meanwhile.
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(fd, "rb") as read, (target / name).open("xb") as write:  # noqa: PTH123
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise CheckpointError(f"{path}: is no file any more; did it change meanwhile?")
            shutil.copyfileobj(read, write)


def follow(path: Path, root: Path) -> Path:
    """Return `path` without links.

    Raises:
        CheckpointError: It leads out of the checkpoint.
    """
    real, home = path.resolve(), root.resolve()
    if real.is_relative_to(home) or any(real.is_relative_to(blobs) for blobs in _blobs(home)):
        return real
    raise CheckpointError(
        f"{path}: is a link to {real}, outside of the checkpoint, and would be copied into the "
        "output; replace it by a copy if it belongs there, or remove it"
    )


def _blobs(home: Path) -> Iterator[Path]:
    """Yield where `models--x--y/snapshots/REV` of a hub cache links to."""
    for folder in (home, *home.parents):
        if folder.parent.name == "snapshots" and "--" in folder.parent.parent.name:
            yield folder.parent.parent / "blobs"


def _is_unicode(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def files_below(folder: Path, root: Path) -> dict[str, Path]:
    """Return every file below `folder`, hidden ones excepted, by its name relative to `root`."""
    if folder.is_symlink():  # it may also lead back to where we are
        raise CheckpointError(
            f"{folder}: is a link to a directory, and would be copied into the output; replace it "
            "by a copy if it belongs there, or remove it"
        )
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        if path.is_dir():
            found |= files_below(path, root)
        elif path.is_file():
            found[path.relative_to(root).as_posix()] = follow(path, root)
    return found


def _named_folders(root: Path, files: Mapping[str, Path]) -> set[str]:
    """Return first parts of the paths that config files hold, such as `1_Pooling`."""
    named = {TEMPLATE_DIRECTORY}
    configs = [path for name, path in files.items() if name.endswith(".json")]
    for path in [*configs, root / CONFIG_NAME]:
        if _NO_CONFIG.fullmatch(path.name) or not path.is_file():
            continue
        if path.stat().st_size <= _MAX_CONFIG_BYTES:
            with path.open("rb") as file:
                text = file.read(_MAX_CONFIG_BYTES)
            try:
                document = parse(text, str(path), lenient=True)
            except EndorError:
                continue
            named |= {value.removeprefix("./").partition("/")[0] for value in _strings(document)}
    return named - {"", ".", ".."}


def _strings(value: object) -> Iterator[str]:
    """Yield every string, and the keys under `types`, where routers name their folders."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _strings(item)
            if key == "types" and isinstance(item, dict):
                yield from item


def _weight_files(source: CheckpointSource) -> set[str]:
    """Return the names of the files that the tensors of `source` are read from."""
    assert source.directory is not None
    names = {path.name for path in source.directory.iterdir()}
    packed = {name for name in names if SHARD_NAME.fullmatch(name)}
    packed |= names & OF_SHARDS if packed else set()
    dense = {tensor.file for tensor in source.tensors.values()}
    if packed or dense & names:
        return packed or dense
    return {
        name
        for name in names
        if f"{Path(name).stem}.safetensors".replace("pytorch_model", "model") in dense
    }


def packed_config(
    config: Mapping[str, Any] | None,
    description: Mapping[str, Any],
    format_version: int = FORMAT_VERSION,
) -> dict[str, Any] | None:
    """Return config.json of the packed checkpoint: the dense one, marked as Endor's.

    A quantization of the dense checkpoint (fp8, say) is kept inside ours: unpacking restores it.
    """
    if config is None:
        return None
    ours: dict[str, Any] = {
        "quant_method": "endor",
        "format_version": format_version,
        **description,
    }
    if QUANTIZATION_KEY in config:
        ours[SOURCE_QUANTIZATION_KEY] = config[QUANTIZATION_KEY]
    return {**config, QUANTIZATION_KEY: ours}


def quantization_name(section: Any) -> str:
    """Return what a `quantization_config` calls its method."""
    name = section.get("quant_method") if isinstance(section, Mapping) else None
    return str(name or "unknown method")


def source_quantization(section: Any) -> str | None:
    """Return the method by which a checkpoint was quantized before it was packed, if it was.

    Args:
        section: The `quantization_config` of the packed checkpoint.
    """
    found = section.get(SOURCE_QUANTIZATION_KEY) if isinstance(section, Mapping) else None
    return None if found is None else quantization_name(found)


def dense_config(config: dict[str, Any] | None, path: Path) -> dict[str, Any] | None:
    """Return config.json of the dense checkpoint that a packed one stands for.

    Raises:
        CheckpointError: the config does not describe a packed checkpoint.
    """
    if config is None:
        return None
    ours = config.get(QUANTIZATION_KEY)
    if not isinstance(ours, dict) or ours.get("quant_method") != "endor":
        raise CheckpointError(
            f"{path}: {CONFIG_NAME} must have {QUANTIZATION_KEY}.quant_method 'endor', which marks "
            "a packed checkpoint; restore the file"
        )
    dense = {key: value for key, value in config.items() if key != QUANTIZATION_KEY}
    if SOURCE_QUANTIZATION_KEY in ours:
        dense[QUANTIZATION_KEY] = ours[SOURCE_QUANTIZATION_KEY]
    return dense
