"""The model card of a packed checkpoint: what was done, what it costs, how to load it."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from endor.checkpoint.companions import QUANTIZATION_KEY, source_quantization
from endor.checkpoint.directory import PACKED_INDEX_NAME, read_config
from endor.checkpoint.index import published_files
from endor.checkpoint.inspect import Inspection, inspect_checkpoint
from endor.errors import ConfigError
from endor.hub.client import hub
from endor.jsontext import read_utf8
from endor.version import __version__

CARD_NAME = "README.md"
MARK = "<!-- This card was made by `endor card`. -->"
"""By which a card of ours is known, and made anew when it is pushed again."""

CARRIED = ("license", "license_name", "license_link", "language", "pipeline_tag")
"""What the card of the base says that is as true of the packed model."""

_HEAD = re.compile(r"\A---\r?\n(.*?)\r?\n---\r?\n", re.DOTALL)
_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_LATER_S = 2.0
"""A README younger than the index by more than this was written after packing: by a person."""


@dataclass(frozen=True, slots=True)
class CardFacts:
    """What a card says besides what the checkpoint itself does.

    Attributes:
        repo: Where it will be on the Hub, for the example; its folder's name otherwise.
        base: The id of the model that was packed; where it was packed from otherwise.
        evaluation: What `endor eval --json` printed about it.
    """

    repo: str | None = None
    base: str | None = None
    evaluation: Mapping[str, Any] = field(default_factory=dict)


def read_evaluation(path: Path) -> dict[str, Any]:
    """Return the last object that `endor eval --json` wrote to a file.

    Raises:
        ConfigError: It holds no such thing.
    """
    lines = [line for line in read_utf8(path, "the evaluation").splitlines() if line.strip()]
    try:
        found = json.loads(lines[-1])
    except (ValueError, IndexError):
        found = None
    if not isinstance(found, dict) or not isinstance(found.get("perplexity"), float):
        raise ConfigError(f"{path}: must hold what `endor eval PACKED --json` printed")
    return found


def own_readme(packed: Path) -> bool:
    """Whether a person wrote the README of a packed checkpoint after it was packed.

    One that came with the base model is listed in the index, and as old; one of ours has a mark.
    """
    path, index = packed / CARD_NAME, packed / PACKED_INDEX_NAME
    if not path.is_file() or MARK in path.read_text(encoding="utf-8", errors="replace"):
        return False
    listed = published_files(index) or frozenset()
    younger = path.stat().st_mtime - index.stat().st_mtime
    return CARD_NAME not in listed or younger > _LATER_S


def model_card(packed: Path, facts: CardFacts | None = None) -> str:
    """Return the card of a packed checkpoint, as README.md of its repository.

    Raises:
        CheckpointError, FormatError: It is no packed checkpoint, or is damaged.
        BackendError: huggingface_hub is not installed.
    """
    facts = facts or CardFacts()
    found = inspect_checkpoint(packed)
    config = read_config(packed) or {}
    about = config.get(QUANTIZATION_KEY) or {}
    stated = config.get("_name_or_path")
    source = found.source
    base = facts.base or (source.repo if source else None)
    base = base or (stated if isinstance(stated, str) and _ID.fullmatch(stated) else None)
    commit = f" at [{source.commit[:12]}]({source.url})" if source and source.repo == base else ""
    name = facts.repo or packed.resolve().name
    head = _front_matter(packed, base, about)
    parts = [
        MARK,
        f"# {name.rpartition('/')[2]}",
        (f"[{base}](https://huggingface.co/{base}){commit}" if base else "A model")
        + ", packed by [Endor](https://pypi.org/project/endor-sparse/) "
        + f"{__version__}: {_what(about)}.",
        _table(found, about, facts.evaluation),
        _loading(name, about),
    ]
    return f"---\n{head}---\n" + "\n\n".join(parts) + "\n"


def _front_matter(packed: Path, base: str | None, about: Mapping[str, Any]) -> str:
    """Return the metadata: the base's licence and languages, and what is new."""
    said = _base_metadata(packed)
    head: dict[str, Any] = {key: said[key] for key in CARRIED if said.get(key)}
    if base is not None:
        head["base_model"] = base
        relation = "quantized" if about.get("quantize") or about.get("prune") else None
        head |= {"base_model_relation": relation} if relation else {}
    elif said.get("base_model"):
        head["base_model"] = said["base_model"]
    head["library_name"] = "endor"
    kept = said.get("tags")
    tags = [str(tag) for tag in kept] if isinstance(kept, list) else []
    tags += ["endor", "transformers", "compressed"]
    tags += ["pruned"] if about.get("prune") else []
    tags += ["quantized"] if about.get("quantize") else []
    head["tags"] = list(dict.fromkeys(tags))
    hub()  # which brings yaml
    import yaml

    text: str = yaml.safe_dump(head, sort_keys=False, allow_unicode=True)
    return text


def _base_metadata(packed: Path) -> dict[str, Any]:
    """Return the metadata of the card that was carried over; empty where there is none."""
    path = packed / CARD_NAME
    if not path.is_file():
        return {}
    match = _HEAD.match(path.read_text(encoding="utf-8", errors="replace"))
    if match is None:
        return {}
    hub()
    import yaml

    try:
        found = yaml.safe_load(match[1])
    except yaml.YAMLError:
        return {}
    return found if isinstance(found, dict) else {}


def _what(about: Mapping[str, Any]) -> str:
    """Return in words what became of the weights."""
    said = []
    prune, quantize = about.get("prune") or {}, about.get("quantize") or {}
    if prune:
        share = prune.get("sparsity")
        said.append(
            f"pruned by {prune.get('method', 'an unnamed method')}"
            + (f" to {share:.0%} zeros" if isinstance(share, float) else "")
            + (f" ({prune['pattern']})" if ":" in str(prune.get("pattern", "")) else "")
        )
    if quantize:
        bits = quantize.get("bits")
        said.append(
            "quantised"
            + (f" to {bits:.4g} bits a weight" if isinstance(bits, (int, float)) else "")
            + (f" by {quantize['method']}" if quantize.get("method") else "")
            + ("" if quantize.get("calibration") else ", without calibration")
        )
    before = source_quantization(about)
    if before and not said:
        return f"its {before} codes entropy-coded, every bit kept"
    return " and ".join(said) or "every bit kept"


def _table(found: Inspection, about: Mapping[str, Any], evaluation: Mapping[str, Any]) -> str:
    sizes = found.sizes
    rows = [
        ("size", f"{sizes.packed_bytes / 1e9:.3f} GB, dense {sizes.dense_bytes / 1e9:.3f} GB"),
        ("smaller", f"{sizes.ratio:.2f} times"),
    ]
    if sizes.packed_tensors:
        rows.append(("bits a weight", f"{sizes.bits_per_weight:.3f} with metadata and padding"))
        rows.append(("weights stored", f"{sizes.density:.1%} of {sizes.weights:,}"))
    error = (about.get("quantize") or {}).get("output_error")
    if isinstance(error, float):
        rows.append(("relative output error", f"{error:.4f}, mean of the quantised layers"))
    value = evaluation.get("perplexity")
    if isinstance(value, float):
        window = evaluation.get("window")
        where = f", windows of {window} tokens" if window else ""
        rows.append(("perplexity", f"{value:.3f}{where} (`endor eval`)"))
    return "| | |\n|---|---|\n" + "\n".join(f"| {key} | {text} |" for key, text in rows)


def _loading(name: str, about: Mapping[str, Any]) -> str:
    if source_quantization(about):
        return (
            "Its weights were quantised before they were packed: unpack it to run it.\n\n"
            f"```\npip install 'endor-sparse[hf]'\nendor unpack {name} DIRECTORY\n```"
        )
    return (
        "```\npip install 'endor-sparse[hf]'\n"
        f'endor generate {name} --prompt "Once upon a time"\n```\n\n'
        "```python\nimport endor\n"
        f'model = endor.load_model("{name}", device="cuda", vram="6GiB", ram="16GiB")\n```\n\n'
        f"`endor unpack {name} DIRECTORY` makes an ordinary checkpoint of it."
    )
