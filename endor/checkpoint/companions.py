"""What belongs to a checkpoint besides weights: config, tokenizer, templates, licence, code."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from endor.checkpoint.source import CONFIG_NAME
from endor.checkpoint.tensors import CheckpointSource
from endor.errors import CheckpointError
from endor.storage.layout import FORMAT_VERSION

QUANTIZATION_KEY = "quantization_config"
SOURCE_QUANTIZATION_KEY = "source_quantization_config"
TEMPLATE_DIRECTORY = "additional_chat_templates"

_WEIGHT_SUFFIXES = {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack"}
_WEIGHT_SUFFIXES |= {".onnx", ".npz", ".ot", ".tflite"}
_WEIGHT_ENDINGS = (".safetensors.index.json", ".bin.index.json")


def companion_files(directory: Path) -> list[Path]:
    """Return the files beside the weights, config.json excepted, in order of name."""
    found = [
        path
        for path in directory.iterdir()
        if path.is_file()
        and not path.name.startswith(".")
        and path.name != CONFIG_NAME
        and path.suffix.lower() not in _WEIGHT_SUFFIXES
        and not path.name.endswith(_WEIGHT_ENDINGS)
    ]
    return sorted(found)


def copy_companions(
    source: CheckpointSource, target: Path, config: Mapping[str, Any] | None
) -> None:
    """Copy what lies beside the weights of `source` to `target`, and write `config` there."""
    if config is not None:
        text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
        (target / CONFIG_NAME).write_text(text, encoding="utf-8")
    if source.directory is None:
        return
    for path in companion_files(source.directory):
        shutil.copyfile(path, target / path.name)
    templates = source.directory / TEMPLATE_DIRECTORY
    if templates.is_dir():
        shutil.copytree(templates, target / TEMPLATE_DIRECTORY, dirs_exist_ok=True)


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
