"""How the packed parts of one layer lie in one run of bytes, and how they are found there.

    0            256 k         256 m                         nbytes
    | array | pad | array | pad | ... | last array | readable |

The bytes are what vLLM keeps as the layer's parameter, moves and prefetches; where what lies in
them is the same wherever they are.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from endor.codecs import Encoded, TensorSpec

ALIGN = 256
READABLE = 128
"""Bytes after the last array that kernels may read."""


@dataclass(frozen=True, slots=True)
class Part:
    """Consecutive rows of a layer's matrix.

    Attributes:
        row: The first of them.
        spec: How they are stored.
        offsets: Where each array begins, by suffix.
    """

    row: int
    spec: TensorSpec
    offsets: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Placement:
    """All rows of a layer's matrix.

    Attributes:
        parts: By row.
        nbytes: Of all arrays with what is between and after them.
    """

    parts: tuple[Part, ...]
    nbytes: int

    @classmethod
    def of(cls, parts: Sequence[tuple[int, Encoded]]) -> "Placement":
        """Return where `parts`, by row, are to lie."""
        placed, end = [], 0
        for row, encoded in parts:
            offsets = {}
            for array in encoded.spec.arrays:
                offsets[array.suffix] = end
                end += -(-array.nbytes // ALIGN) * ALIGN
            placed.append(Part(row, encoded.spec, offsets))
        return cls(tuple(placed), end + READABLE)

    def fill(self, parts: Sequence[tuple[int, Encoded]], out: np.ndarray) -> None:
        """Write the arrays of `parts` to `out`, u8, and zeros between them."""
        out[:] = 0
        for part, (_, encoded) in zip(self.parts, parts, strict=True):
            for suffix, at in part.offsets.items():
                flat = encoded.arrays[suffix].reshape(-1).view(np.uint8)
                out[at : at + flat.size] = flat

    def bind(self, data: np.ndarray) -> list[tuple[int, Encoded]]:
        """Return the parts as views of `data`, u8, which `fill` wrote, or a copy of that."""
        return [(part.row, _bind(part, data)) for part in self.parts]


def join_dense(parts: Sequence[tuple[int, Encoded]]) -> list[tuple[int, Encoded]]:
    """Return `parts` in the order of their rows, as one if none is packed.

    What is stored dense can then be multiplied by where it lies.
    """
    ordered = sorted(parts, key=lambda part: part[0])
    specs = [encoded.spec for _, encoded in ordered]
    if len(specs) < 2 or any(
        spec.codec != "dense" or spec.dtype != specs[0].dtype for spec in specs
    ):
        return ordered
    whole = np.concatenate([encoded.arrays[""] for _, encoded in ordered])
    spec = TensorSpec(whole.shape, specs[0].dtype, "dense", bitmap=False, nnz=whole.size)
    return [(ordered[0][0], Encoded(spec, {"": whole}))]


def _bind(part: Part, data: np.ndarray) -> Encoded:
    arrays = {}
    for array in part.spec.arrays:
        at = part.offsets[array.suffix]
        flat = data[at : at + array.nbytes].view(array.dtype.uint)
        arrays[array.suffix] = flat.reshape(array.unit_shape)
    return Encoded(part.spec, arrays)
