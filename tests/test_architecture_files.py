"""Files, not rooms: no circle of imports, no import upwards, no room and no module too large."""

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import endor

ROOT = Path(endor.__file__).resolve().parent.parent

ORDER = [
    *("version", "errors", "dependencies", "namesake", "sizes", "foreign", "jsontext", "threads"),
    "openmp",
    *(
        "hub",
        "codecs",
        "dtypes",
        "kernels",
        "machine",
        "trust",
        "packed",
        "storage",
        "formats",
        "checkpoint",
        "sharing",
        "planning",
    ),
    *("models", "pruning", "quantization", "packing", "offload", "hf", "serving", "bench", "cli"),
]
"""Rooms, and modules beside them: each imports from those before it, and from its own."""

FACADES = {"endor", "endor.__main__"}
"""Show names of other rooms to the outside."""

USERS = {"bench", "cli"}
"""Rooms that use the library as anybody would: through its facade."""

ROOM_SHARE = 0.15
MODULE_LINES = 350


@cache
def modules() -> dict[str, Path]:
    """Return every module of the package by its dotted name."""
    found = {}
    for top in ("endor", "cli"):
        for path in sorted((ROOT / top).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            parts = ("endor", *parts) if top == "cli" else parts
            if len(parts) > 2 and parts[:2] == ("endor", "cli") and top == "endor":
                continue  # the link, of which the folder itself is read
            found[".".join(parts).removesuffix(".__init__")] = path
    return found


def imports(path: Path) -> Iterator[str]:
    """Yield the modules that a file imports, wherever in it, also only for types."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            inside = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in modules() else node.module for name in inside]
        else:
            continue
        yield from (name for name in names if name in modules())


@cache
def graph() -> dict[str, set[str]]:
    return {name: set(imports(path)) - {name} for name, path in modules().items()}


def circles(edges: dict[str, set[str]]) -> list[list[str]]:
    """Return the sets of modules that reach each other."""

    def reached(start: str) -> set[str]:
        seen: set[str] = set()
        left = [start]
        while left:
            for name in edges[left.pop()] - seen:
                seen.add(name)
                left.append(name)
        return seen

    reach = {name: reached(name) for name in edges}
    found = {
        tuple(sorted(other for other in reach[name] if name in reach[other]))
        for name in edges
        if name in reach[name]
    }
    return [list(circle) for circle in sorted(found)]


def room(name: str) -> str:
    return name.split(".")[1]


def test_a_circle_is_seen():
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [["a", "b", "c"]]


def test_no_imports_in_circles():
    edges = {name: to - FACADES for name, to in graph().items() if name not in FACADES}
    assert circles(edges) == []


def test_only_users_import_the_facade():
    users = {name for name, to in graph().items() if to & FACADES} - FACADES
    assert {name for name in users if room(name) not in USERS} == set()


@pytest.mark.parametrize("name", sorted(set(modules()) - FACADES))
def test_imports_point_one_way(name):
    allowed = set(ORDER[: ORDER.index(room(name)) + 1])
    assert {room(other) for other in graph()[name] - FACADES} <= allowed


def test_no_room_is_most_of_the_house():
    lines: dict[str, int] = {}
    for name, path in modules().items():
        if name not in FACADES:
            count = len(path.read_text(encoding="utf-8").splitlines())
            lines[room(name)] = lines.get(room(name), 0) + count
    total = sum(lines.values())
    assert {
        name: count / total for name, count in lines.items() if count > ROOM_SHARE * total
    } == {}


def test_no_module_is_too_long():
    found = {
        str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines())
        for path in modules().values()
    }
    assert {name: count for name, count in found.items() if count > MODULE_LINES} == {}
