"""Where a model lies that was given as a path or as an id of the Hub: fetched if it is not here.

Of a model on the Hub the files are fetched that `directory.choose` would take, and what belongs to
them: not the same weights in other formats, precisions and layouts. They go into huggingface_hub's
cache, which other libraries share.
"""

import glob
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path

from endor.checkpoint.companions import MAX_COMPANION_BYTES, OF_SHARDS, is_weights
from endor.checkpoint.composite import is_composite
from endor.checkpoint.directory import (
    DIFFUSION_NAMES,
    EXPLICIT_KEY,
    PACKED_INDEX_NAME,
    STANDARD_NAMES,
    is_diffusion,
    read_config,
)
from endor.errors import CheckpointError, HubError
from endor.hub.client import BrokenOff, RemoteFile, Repository, hub, hub_errors, look_up, patiently
from endor.hub.names import HubName, hub_name
from endor.jsontext import read_object

_TRIES = 3
"""Times that a branch may move between two questions."""


def located(
    model: Path | str, *, revision: str | None = None, weights: bool = True, bars: bool = False
) -> Path:
    """Return the directory or file of a model, fetched first where it is an id of the Hub.

    Args:
        model: A path; or `org/name`, or `org/name@revision`, where no such path is.
        revision: A branch, tag or commit of the Hub.
        weights: Whether its weights are fetched too.
        bars: Whether huggingface_hub may show its progress.

    Raises:
        ConfigError: A revision was given of what is no model on the Hub.
        BackendError: huggingface_hub is not installed.
        HubError: The model cannot be had.
    """
    name = hub_name(model, revision)
    if name is None:
        return Path(model)
    return fetched(name, weights=weights, bars=bars)


def fetched(name: HubName, *, weights: bool = True, bars: bool = False) -> Path:
    """Return the folder of a model in the cache, with what is missing fetched from the Hub.

    Raises:
        HubError: It cannot be had: see `hub_errors`.
    """
    with hub_bars(bars):
        return _fetched(name, weights)


def _fetched(name: HubName, weights: bool) -> Path:
    for _ in range(_TRIES):
        try:
            repository = patiently(lambda: look_up(name)) if not _offline() else None
        except BrokenOff:
            folder = _cached(name)
            if folder is None:
                raise
            return folder
        if repository is None:
            folder = _cached(name)
            if folder is None:
                raise HubError(
                    f"{name}: is not in the cache, and HF_HUB_OFFLINE forbids to fetch it; unset "
                    "that, or give a folder"
                )
            return folder
        folder = _snapshot(name, companion_files(repository))
        if weights:
            folder = _snapshot(
                name, [*companion_files(repository), *weight_files(repository, folder)]
            )
        if folder.name == repository.commit:
            return folder
    raise HubError(f"{name}: changes while it is fetched; name a commit as its revision")


def companion_files(repository: Repository) -> list[str]:
    """Return the files of a model besides weights."""
    return [
        file.name
        for file in repository.files.values()
        if file.nbytes <= MAX_COMPANION_BYTES
        and (not is_weights(file.name) or file.name in OF_SHARDS)
        and not any(part.startswith(".") for part in file.name.split("/"))
    ]


def weight_files(repository: Repository, folder: Path) -> list[str]:
    """Return the files of weights that Endor takes of a model.

    Args:
        repository: The model.
        folder: Its other files.

    Raises:
        HubError: It has none.
    """
    files = repository.files
    if is_composite(folder):
        return _of_parts(files)
    config = read_config(folder)
    names: tuple[str, ...] = DIFFUSION_NAMES if is_diffusion(config) else STANDARD_NAMES
    explicit = (config or {}).get(EXPLICIT_KEY)
    if isinstance(explicit, str):
        names = (explicit,)
    marked = (config or {}).get("quantization_config")
    packed = isinstance(marked, dict) and marked.get("quant_method") == "endor"
    if PACKED_INDEX_NAME in files and (packed or config is None):
        names = (PACKED_INDEX_NAME,)
    taken = next((name for name in names if name in files), None)
    lone = [name for name in files if name.endswith(".safetensors") and "/" not in name]
    if taken is None and len(lone) == 1:
        taken = lone[0]
    if taken is None:
        held = sorted(name for name in files if is_weights(name))
        what = f"; it holds {held[0]}" + (f" and {len(held) - 1} more" if held[1:] else "")
        raise HubError(
            f"{repository.name}: has no weights that Endor takes by its id"
            f"{what if held else ''}; fetch what you mean: "
            f"hf download {repository.name.repo} --local-dir DIRECTORY"
        )
    if not taken.endswith(".index.json"):
        return [taken]
    return sorted(_listed(repository, folder, taken))


def _listed(repository: Repository, folder: Path, index: str) -> set[str]:
    """Return the shards that an index lists; those must be there."""
    weight_map = read_object(folder / index, lenient=True).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{repository.name}: {index}: weight_map must map tensors to files")
    files = {str(file) for file in weight_map.values()}
    missing = sorted(files - repository.files.keys())
    if missing:
        raise HubError(
            f"{repository.name}: {index} lists {missing[0]}, which the Hub does not have: the "
            "model is incomplete there"
        )
    return files


def _of_parts(files: Mapping[str, RemoteFile]) -> list[str]:
    """Return the weights of all parts of a folder of models, safetensors where there are such."""
    found = [name for name in files if name.endswith((".safetensors", ".bin"))]
    safe = {name.rpartition("/")[0] for name in found if name.endswith(".safetensors")}
    return [
        name
        for name in found
        if (name.endswith(".safetensors") or name.rpartition("/")[0] not in safe)
        and "." not in name.rpartition("/")[2].rpartition(".")[0]  # a variant: model.fp16
    ]


def _snapshot(name: HubName, files: list[str]) -> Path:
    def once() -> Path:
        with hub_errors(name):
            found = hub().snapshot_download(
                name.repo,
                revision=name.revision,
                allow_patterns=[glob.escape(file) for file in files],
            )
        return Path(found)

    folder: Path = patiently(once)
    return folder


def _cached(name: HubName) -> Path | None:
    """Return what the cache holds of a model; None for nothing that could be one."""
    kinds = import_module("huggingface_hub.errors")
    try:
        found = hub().snapshot_download(
            name.repo,
            revision=name.revision,
            local_files_only=True,
            allow_patterns=["config.json", "*.safetensors", "*.safetensors.index.json"],
        )
    except (kinds.LocalEntryNotFoundError, OSError, ValueError):
        return None
    return Path(found)


def _offline() -> bool:
    return bool(hub().constants.HF_HUB_OFFLINE)


@contextmanager
def hub_bars(shown: bool) -> Iterator[None]:
    """Silence huggingface_hub, whose bars are a setting of the process, or let it speak."""
    tools = hub().utils
    if shown or tools.are_progress_bars_disabled():
        yield
        return
    tools.disable_progress_bars()
    try:
        yield
    finally:
        tools.enable_progress_bars()
