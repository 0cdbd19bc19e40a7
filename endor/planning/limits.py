"""How much memory this process may take: what the machine has left, and what its groups allow.

A limit of a control group holds for all groups below it, so each group from the process's own up to
the root counts, in version 1 and 2, wherever the hierarchies are mounted.
"""

from collections.abc import Iterator
from pathlib import Path, PurePosixPath

_FILES = {
    "cgroup2": (("memory.max", "memory.high"), "memory.current"),
    "cgroup": (("memory.limit_in_bytes",), "memory.usage_in_bytes"),
}
"""Per kind of file system: the files with limits, and the one with what is in use."""

_CACHES = ("total_inactive_file", "inactive_file")
"""Entries of `memory.stat`, version 1 and 2: page cache in use that gives way."""


def available_bytes(root: Path = Path("/")) -> int:
    """Return the memory that this process may still take: nine tenths of what is available.

    Args:
        root: Where `proc` and the control groups are; another one in tests.
    """
    limits = [limit for _, limit in group_limits(root)]
    for line in _lines(root / "proc/meminfo"):
        if line.startswith("MemAvailable:"):
            limits.append(int(line.split()[1]) * 1024)
    return max(0, min(limits, default=1 << 40)) * 9 // 10


def group_limits(root: Path = Path("/")) -> Iterator[tuple[Path, int]]:
    """Yield, for each control group of this process that limits memory, what it has left."""
    for kind, mount, top, group in _memberships(root):
        below = group.relative_to(top).parts if group.is_relative_to(top) else ()
        for depth in range(len(below), -1, -1):
            folder = root.joinpath(mount.relative_to("/"), *below[:depth])
            names, in_use = _FILES[kind]
            found = [_number(folder / name) for name in names]
            limits = [limit for limit in found if limit is not None]
            if limits:
                yield folder, min(limits) - _in_use(folder, in_use)


def _memberships(root: Path) -> Iterator[tuple[str, PurePosixPath, PurePosixPath, PurePosixPath]]:
    """Yield (file system, mount point, mounted folder, own group) of hierarchies with memory."""
    groups: dict[str, PurePosixPath] = {}
    for line in _lines(root / "proc/self/cgroup"):
        number, controllers, path = [*line.split(":", 2), "", ""][:3]
        if number == "0" and not controllers:
            groups["cgroup2"] = PurePosixPath(path)
        elif "memory" in controllers.split(","):
            groups["cgroup"] = PurePosixPath(path)
    for line in _lines(root / "proc/self/mountinfo"):
        before, _, after = line.partition(" - ")
        fields, rest = before.split(), after.split()
        if len(fields) < 5 or len(rest) < 3 or rest[0] not in groups:
            continue
        if rest[0] == "cgroup" and "memory" not in rest[2].split(","):
            continue
        mount, top = (PurePosixPath(_unescaped(fields[at])) for at in (4, 3))
        if mount.is_absolute():
            yield rest[0], mount, top, groups[rest[0]]


def _in_use(folder: Path, name: str) -> int:
    """Return the memory that a group uses, without page cache that gives way."""
    used = _number(folder / name) or 0
    entries = dict(line.partition(" ")[::2] for line in _lines(folder / "memory.stat"))
    cache = next((entries[key] for key in _CACHES if key in entries), "")
    return max(0, used - int(cache)) if cache.isdecimal() else used


def _number(path: Path) -> int | None:
    """Return the number in a file; None where there is none, or `max`."""
    text = " ".join(_lines(path)).strip()
    return int(text) if text.isdecimal() and len(text) < 20 else None


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []


def _unescaped(text: str) -> str:
    """Undo the octal escapes of blanks in mountinfo."""
    for code, character in (("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")):
        text = text.replace(code, character)
    return text
