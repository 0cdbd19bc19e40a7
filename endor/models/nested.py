"""Arguments of modules, which may be nested."""

from collections.abc import Callable
from typing import Any


def map_nested(change: Callable[[Any], Any], value: Any) -> Any:
    """Return `value` with `change` done to it, or to each item of nested lists and dicts."""
    if isinstance(value, dict):
        return {key: map_nested(change, item) for key, item in value.items()}
    if isinstance(value, list | tuple) and type(value) in (list, tuple):
        return type(value)(map_nested(change, item) for item in value)
    return change(value)
