"""A tiny config of any architecture: its default one, shrunk by what the members are called.

A config is read as plain data, sub-configs and all. Widths, counts and token ids get small values
by rules over the words of their names, so that what must agree (heads times head size, a vision
tower's output and the text's width) still does. `PATCHES` holds what no rule finds.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from shrink_rules import (
    FIXED_IDS,
    HEAD,
    HEADS,
    IMAGE,
    KEEP,
    LAYERS,
    MOST_LAYERS,
    NOT_LAYERS,
    OPEN,
    PARTS,
    PATCH,
    PATCHES,
    RULES,
    STAGES,
    TOKEN,
    VOCAB,
    WIDTH,
)

ATTEMPTS = 3


def tiny(config_class: Any, *, attempt: int = 0) -> Any:
    """Return a small config of a class.

    Args:
        config_class: Of transformers.
        attempt: 1 also replaces what says how positions are rotated by the plainest that there is;
            2 also fills members that a real config has and the default one leaves open, and scales
            large numbers that no rule knows.
    """
    values = config_class().to_dict()
    small = _shrink(values, _Ids(), attempt)
    for path, value in PATCHES.get(values.get("model_type", ""), {}).items():
        _set(small, path.split("."), value)
    for key in (
        "transformers_version",
        "_name_or_path",
        "architectures",
        "dtype",
        "id2label",
        "label2id",
        "model_type",
    ):
        small.pop(key, None)
    return config_class(**small)


class _Ids:
    """Token ids below the vocabulary, the same for the same name wherever it stands."""

    def __init__(self) -> None:
        self._taken: dict[str, int] = {}

    def of(self, key: str) -> int | None:
        stem = re.sub(r"_?(token)?_?(id|ids|index|idx)$", "", key)
        if stem in FIXED_IDS:
            return FIXED_IDS[stem]
        return self._taken.setdefault(stem, VOCAB - 16 - len(self._taken))


def _shrink(values: Mapping[str, Any], ids: _Ids, attempt: int) -> dict[str, Any]:
    out: dict[str, Any] = {}
    counts = {
        key: value
        for key, value in values.items()
        if _is_count(value) and LAYERS.fullmatch(key) and not NOT_LAYERS.fullmatch(key)
    }
    kept = {count: _kept_layers(values, count) for count in set(counts.values())}
    main = counts.get("num_hidden_layers", max(counts.values(), default=2))
    for key, value in values.items():
        if key in STAGES:
            continue
        if _is_by_layer(value):
            out[key] = {
                new: _shrink(value.get(old, value.get(str(old))), ids, attempt)
                for new, old in enumerate(kept.get(main, ()))
                if old in value or str(old) in value
            }
        elif key in counts:
            out[key] = len(kept[value])
        elif _is_per_layer(key, value, kept):
            out[key] = [value[at] for at in kept[len(value)]]
            if all(_is_count(item) for item in value):
                out[key] = [_value(key.removesuffix("s"), item, attempt) for item in out[key]]
        else:
            out[key] = _member(key, value, ids, attempt, len(kept.get(main, "12")))
    if attempt == 2:
        out |= {key: small for key, small in OPEN.items() if key in out and out[key] is None}
    heads = values.get("num_attention_heads")
    if heads is not None and values.get("num_key_value_heads") == heads:
        out["num_key_value_heads"] = out["num_attention_heads"]
    parts: tuple[Any, Any] = values.get("qk_rope_head_dim"), values.get("qk_nope_head_dim")
    if all(_is_count(part) for part in parts):
        out |= {
            key: 2 * HEAD
            for key, value in values.items()
            if key.endswith("head_dim") and value == sum(parts) and key not in PARTS
        }
    if (
        values.get("patch_size")
        and _is_count(values.get("window_size"))
        and values["window_size"] > 32
    ):
        out["window_size"] = 4 * PATCH
    if isinstance(out.get("rope_parameters"), dict):
        out["rope_parameters"] = _rope(out["rope_parameters"], attempt, out)
    return out


def _is_per_layer(key: str, value: Any, kept: Mapping[int, Any]) -> bool:
    """Whether a list has a member for each layer: long, or by its name."""
    if not isinstance(value, list) or len(value) not in kept or len(value) < 3:
        return False
    return len(value) > 4 or re.search("layer|types|pattern|block", key) is not None


def _kept_layers(values: Mapping[str, Any], count: int) -> list[int]:
    """Return which of `count` layers stay: one of each kind, two at least."""
    kinds = [value for value in values.values() if isinstance(value, list) and len(value) == count]
    by_layer = [value for value in values.values() if _is_by_layer(value)]
    kinds += [[at in each or str(at) in each for at in range(count)] for each in by_layer]
    seen: dict[Any, int] = {}
    for at in range(count):
        seen.setdefault(tuple(str(kind[at]) for kind in kinds), at)
    kept = sorted(seen.values())[:MOST_LAYERS]
    return sorted({*kept, *[at for at in range(count) if at not in kept][: max(0, 2 - len(kept))]})


def _member(key: str, value: Any, ids: _Ids, attempt: int, layers: int) -> Any:
    if isinstance(value, Mapping):
        return _shrink(value, ids, attempt)
    if key in KEEP or value is None or isinstance(value, bool | str | float):
        return value
    if isinstance(value, list | tuple):
        if TOKEN.fullmatch(key) and all(_is_count(item) for item in value):
            return (
                [
                    ids.of(key.removesuffix("s") + (str(at) if at else "")) or 2
                    for at in range(len(value))
                ]
                if value
                else value
            )
        if key.endswith(("indexes", "indices", "layers", "layer_ids", "feature_layer")) and all(
            isinstance(item, int) for item in value
        ):
            return sorted({max(min(item, layers - 1), -layers) for item in value})
        if key == "image_grid_pinpoints":
            return [[IMAGE, IMAGE]]
        return [
            _shrink(item, ids, attempt)
            if isinstance(item, Mapping)
            else _value(key.removesuffix("s"), item, attempt)
            for item in value
        ]
    if not isinstance(value, int):
        return value
    if TOKEN.fullmatch(key):
        return ids.of(key) if value >= 0 else value
    return _value(key, value, attempt)


def _value(key: str, value: Any, attempt: int) -> Any:
    """Return the small value of a count."""
    if not _is_count(value) or key in KEEP:
        return value
    for pattern, small in RULES:
        if pattern.fullmatch(key):
            if small == HEADS and "head" in key:
                return small if value > 2 else value
            return min(value, small)
    if LAYERS.fullmatch(key) and not NOT_LAYERS.fullmatch(key):
        return min(value, 2)
    if attempt == 2 and value > 256:
        return WIDTH
    return value


def _is_by_layer(value: Any) -> bool:
    """Whether it is a table of members by number of layer."""
    return (
        isinstance(value, Mapping)
        and bool(value)
        and all(str(key).isdigit() and isinstance(item, Mapping) for key, item in value.items())
    )


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _rope(rope: dict[str, Any], attempt: int, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return rotary parameters for small heads."""
    if any(isinstance(value, dict) for value in rope.values()):
        return {
            key: _rope(value, attempt, config) if isinstance(value, dict) else value
            for key, value in rope.items()
        }
    factor = rope.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0
    half = int(HEAD * factor) // 2
    section = [half // 4, half * 3 // 8, half - half // 4 - half * 3 // 8]
    if attempt:
        kept: dict[str, Any] = {
            key: rope[key] for key in ("rope_theta", "partial_rotary_factor") if key in rope
        }
        return {"rope_theta": 10000.0, **kept, "rope_type": "default", "mrope_section": section}
    if isinstance(rope.get("mrope_section"), list) and len(rope["mrope_section"]) == 3:
        rope["mrope_section"] = section
    for name in ("long_factor", "short_factor"):
        if isinstance(rope.get(name), list):
            rope[name] = [1.0] * half
    return rope


def _set(values: dict[str, Any], path: list[str], value: Any) -> None:
    for part in path[:-1]:
        values = values.setdefault(part, {})
    values[path[-1]] = value


def sub_configs(config: Any) -> Iterator[Any]:
    """Yield a config and those in it."""
    yield config
    for name in getattr(config, "sub_configs", {}) or {}:
        inner = getattr(config, name, None)
        if inner is not None:
            yield from sub_configs(inner)
