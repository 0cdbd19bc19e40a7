"""Sizes that people write and read."""

import re

from endor.errors import ConfigError

_SIZE = re.compile(r"\s*([0-9]{1,18}(?:\.[0-9]{1,18})?)\s*([KMGT]?i?)B?\s*", re.IGNORECASE)


def parse_bytes(size: int | str, what: str = "size") -> int:
    """Return a size in bytes from `8589934592`, `"8GiB"`, `"500MB"` or `"1.5 G"`.

    `K`, `M`, `G`, `T` are powers of 1000; with an `i`, of 1024.

    Raises:
        ConfigError: It is not a size.
    """
    if isinstance(size, int) and not isinstance(size, bool) and size >= 0:
        return size
    match = _SIZE.fullmatch(size) if isinstance(size, str) else None
    if match is None:
        raise ConfigError(f"{what} must be bytes or text such as '8GiB' or '500MB', got {size!r}")
    number, prefix = match.groups()
    power = " KMGT".index(prefix[0].upper()) if prefix else 0
    return int(float(number) * (1024 if len(prefix) == 2 else 1000) ** power)


def size(nbytes: float) -> str:
    """Return `nbytes` for a reader, in binary units as budgets are given."""
    for unit in ("B", "KiB", "MiB"):
        if nbytes < 1024:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1024
    return f"{nbytes:.2f} GiB"
