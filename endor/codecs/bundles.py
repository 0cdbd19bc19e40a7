"""Where the parts of a bundle lie: what belongs to one neuron, or to a few, in one run of bytes.

    bundles   | bundle 0 | bundle 1 | ...        bundle_offsets counts 8 bytes
    bundle    | nnz u32 | patches u32 | tile_offsets | bitmap | bytes | planes | patch_offsets ...
                                      ^ each array at a multiple of 8 bytes, zeros between

A bundle is a stored tensor of its own: `rows` rows of the matrix, in the codec of the whole.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from endor.errors import FormatError

UNIT = 8
"""Bundles and the arrays inside begin at multiples of so many bytes."""

HEAD = 8
"""Bytes of a bundle before its arrays: stored elements and patches, u32 each."""

MAX_NBYTES = UNIT * ((1 << 32) - 1)

WANTED_NBYTES = 4096
"""Rows are bundled up to about so many bytes: what a disk reads for the price of less."""


@dataclass(frozen=True, slots=True)
class Bundles:
    """How a matrix is bundled.

    Attributes:
        rows: Of each bundle; the last one may have fewer.
        nbytes: Of all bundles.
    """

    rows: int
    nbytes: int

    def count(self, rows: int) -> int:
        """Return the bundles of a stored matrix of so many rows."""
        return -(-rows // self.rows)

    def to_dict(self) -> dict[str, int]:
        """Return the JSON form that a packed file's header holds."""
        return {"rows": self.rows, "nbytes": self.nbytes}

    @classmethod
    def from_dict(cls, members: Any) -> "Bundles":
        """Return what `members` describes.

        Raises:
            FormatError: A member is missing or no integer that can be.
        """
        found = [members.get(key) for key in ("rows", "nbytes")] if _is_dict(members) else []
        if len(found) != 2 or not all(type(one) is int and 0 <= one < 1 << 40 for one in found):
            raise FormatError(f"bundles must be an object of rows and nbytes, got {members!r:.60}")
        return cls(*found)

    def check(self, rows: int) -> None:
        """Raise `FormatError` unless a stored matrix of so many rows can be bundled so."""
        if not 1 <= self.rows <= max(rows, 1):
            raise FormatError(f"bundles must have 1..{max(rows, 1)} rows, got {self.rows}")
        least = HEAD * self.count(rows)
        if not least <= self.nbytes <= MAX_NBYTES or self.nbytes % UNIT:
            raise FormatError(
                f"bundles must take a multiple of {UNIT} in {least}..{MAX_NBYTES} bytes, got "
                f"{self.nbytes}"
            )


def align(nbytes: Any) -> Any:
    """Return `nbytes`, a number or an array of them, rounded up to whole units."""
    return -(-nbytes // UNIT) * UNIT


def places(sizes: list[tuple[str, Any]]) -> Iterator[tuple[str, Any, Any]]:
    """Yield suffix, first byte in its bundle and bytes of each array; at last `""` and the end.

    Args:
        sizes: Suffix and bytes of each array in file order; bytes may be an array, one a bundle.
    """
    at: Any = HEAD
    for suffix, nbytes in sizes:
        yield suffix, at, nbytes
        at = at + align(nbytes)
    yield "", at, np.zeros_like(at)


def _is_dict(value: object) -> bool:
    return isinstance(value, dict)
