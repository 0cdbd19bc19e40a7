"""Which files of a directory Endor wrote: what `--overwrite` may replace, and nothing else.

The index of a packed checkpoint lists every file that was published with it. A dense checkpoint has
no such list, for it equals byte for byte what other tools write, and neither have older packed
ones: there a file is taken for ours by its name, the usual names of checkpoints, and what the
present run writes again with the same content.
"""

import filecmp
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from endor.checkpoint.directory import (
    DIFFUSION_INDEX_NAME,
    PACKED_INDEX_NAME,
    SAFETENSORS_INDEX_NAME,
)
from endor.checkpoint.index import SHARD_NAME, published_files
from endor.errors import EndorError, OutputExistsError
from endor.storage.tree import list_tree, open_directory

_WEIGHTS = re.compile(rf"model(-\d{{5}}-of-\d{{5}})?\.safetensors|{SHARD_NAME.pattern}")
_COMPANIONS = re.compile(
    r"(|.+_)config\.json|tokenizer(|_.+)\.(json|model)|vocab\.(json|txt)|merges\.txt"
    r"|special_tokens_map\.json|added_tokens\.json|chat_template\.(jinja|json)"
    r"|additional_chat_templates/[^/]+\.jinja|spiece\.model|sentencepiece\.bpe\.model"
    r"|tekken\.json|.+\.tiktoken|modules\.json|LICENSE(|\.txt|\.md)|NOTICE(|\.txt)|README\.md"
)
_INDEXES = {PACKED_INDEX_NAME, SAFETENSORS_INDEX_NAME, DIFFUSION_INDEX_NAME}
_SHOWN = 5


Writes = Mapping[str, Path | None]
"""Relative names of what a run writes besides shards; the file that it copies, if it copies one."""


def replaceable(out: Path, writes: Writes) -> frozenset[str]:
    """Return the names of all files in `out`, which is a checkpoint and holds nothing else.

    Args:
        out: A directory.
        writes: What the present run is going to write there.

    Raises:
        OutputExistsError: It is no checkpoint, or holds what Endor did not write.
        OSError: It cannot be read.
    """
    fd = open_directory(out)
    try:
        found = list_tree(fd)
    finally:
        os.close(fd)
    names = {item.name for item in found if item.is_file}
    listed = _listed(out) if PACKED_INDEX_NAME in names else None
    if listed is not None:
        known = listed
    else:
        known = frozenset(name for name in names if _usual(out, name, writes))
    if not any(_is_weights(name, writes) for name in names & known):
        raise OutputExistsError(
            f"{out}: holds no checkpoint, so it is not replaced; remove it yourself or "
            "choose another OUT"
        )
    strangers = sorted(item.name for item in found if not item.is_file or item.name not in known)
    if strangers:
        raise OutputExistsError(
            f"{out}: holds {name_some(strangers)}, which Endor did not write, so it is not "
            "replaced; move that away, or choose another OUT"
        )
    return frozenset(names)


def name_some(names: Iterable[str]) -> str:
    """Return names for a message, the first few of many."""
    names = list(names)
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def _listed(out: Path) -> frozenset[str] | None:
    """Return what the index of a packed checkpoint lists; None when it lists nothing readable."""
    try:
        return published_files(out / PACKED_INDEX_NAME)
    except (EndorError, OSError):
        return None


def _is_weights(name: str, writes: Writes) -> bool:
    return bool(_WEIGHTS.fullmatch(name)) or (name.endswith(".safetensors") and name in writes)


def _usual(out: Path, name: str, writes: Writes) -> bool:
    if name in _INDEXES or _is_weights(name, writes) or _COMPANIONS.fullmatch(name):
        return True
    copied = writes.get(name)
    return copied is not None and filecmp.cmp(out / name, copied, shallow=False)
