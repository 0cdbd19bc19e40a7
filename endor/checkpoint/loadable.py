"""What a packed checkpoint must be to be loaded: marked as one, whole, of plain weights."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from endor.checkpoint.companions import source_quantization
from endor.checkpoint.directory import CONFIG_NAME
from endor.checkpoint.index import check_together
from endor.errors import CheckpointError, ConfigError
from endor.jsontext import read_object
from endor.storage import FileLayout

_SHARD = re.compile(r"endor-(\d{5})-of-(\d{5})\.safetensors")


def read_config(path: Path) -> dict[str, Any]:
    """Return a checkpoint's config.json.

    Raises:
        ConfigError: There is none, or it is no JSON object.
    """
    file = path / CONFIG_NAME
    if not file.exists():
        raise ConfigError(f"{file}: not found; pass the directory of a checkpoint")
    return read_object(file, error=ConfigError, lenient=True)


def refuse_quantized(section: Any) -> None:
    """Raise unless packed weights are what a model multiplies by.

    Args:
        section: The `quantization_config` of a packed checkpoint.

    Raises:
        ConfigError: They were quantized before they were packed, and need their scales.
    """
    method = source_quantization(section)
    if method is not None:
        raise ConfigError(
            f"quantization_config: the weights were quantized ({method}) before they were packed, "
            "and need their scales to be run: `endor unpack` the checkpoint and load the result, "
            "or pack it with --dequantize"
        )


def is_packed(path: Path) -> bool:
    """Whether `path` is the directory of a packed checkpoint, by its config.

    Raises:
        ConfigError: It holds no config.
    """
    section = read_config(path).get("quantization_config")
    return isinstance(section, dict) and section.get("quant_method") == "endor"


def open_layouts(paths: Sequence[str | Path]) -> list[FileLayout]:
    """Return the checked layout of each file, in order of shards.

    Raises:
        CheckpointError: A shard is missing, or two files hold the same tensor.
        ChecksumError: A shard is not the one that the index beside it was written for.
        FormatError: A file is damaged, truncated or no packed file.
    """
    files = sorted({Path(path) for path in paths}, key=lambda path: path.name)
    for path in files:
        match = _SHARD.fullmatch(path.name)
        if match and int(match[2]) != len(files):
            raise CheckpointError(
                f"{path}: one of {int(match[2])} shards, but the index names {len(files)}; "
                "copy the checkpoint again"
            )
    layouts = [FileLayout.read(path) for path in files]
    check_together(layouts)
    seen: dict[str, Path] = {}
    for layout in layouts:
        for name in layout.tensors:
            if name in seen:
                raise CheckpointError(
                    f"{layout.path}: tensor {name} is in {seen[name].name} too; "
                    "copy or convert the checkpoint again"
                )
            seen[name] = layout.path
    return layouts
