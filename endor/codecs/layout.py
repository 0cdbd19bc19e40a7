"""Where a tensor of another format keeps its symbols: fields of bits in repeating blocks of bytes.

A tensor is a sequence of equal **blocks**. A **field** is one sequence of symbols, the same number
in every block; a symbol is made of the bits of one **part** or of several, the lowest first. A part
is a run of bytes of the block that holds 1, 2, 4 or 8 bits of each symbol. Its bytes are cut into
**spans**; inside a span, first come the lowest bits of all bytes, then the next ones.

    span 1      byte 0: low nibble, high nibble; byte 1: ...           int4 in words, NF4, mxfp4
    span 16     low nibbles of 16 bytes, then their high nibbles       GGUF's Q4_0

What no field holds is the **rest**, which is stored as it is.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from endor.codecs.coding import CHUNK, LANES, MAX_WORDS
from endor.errors import FormatError

MAX_BLOCK = 1 << 16
MAX_FIELDS = 16
MAX_PARTS = 8
WIDTHS = (1, 2, 4, 8)


@dataclass(frozen=True, slots=True)
class Part:
    """Some bits of every symbol of a field.

    Attributes:
        at: First byte in the block.
        nbytes: Bytes of the block.
        bits: Of each symbol: 1, 2, 4 or 8.
        span: Bytes whose bits of one place follow each other; divides `nbytes`.
    """

    at: int
    nbytes: int
    bits: int
    span: int = 1

    @property
    def symbols(self) -> int:
        """Symbols of a block."""
        return self.nbytes * 8 // self.bits

    def take(self, blocks: np.ndarray) -> np.ndarray:
        """Return this part of every symbol, u8 `(blocks, symbols)`, of u8 `(blocks, block)`."""
        held = blocks[:, self.at : self.at + self.nbytes]
        if self.bits == 8:
            return held
        held = held.reshape(len(blocks), -1, 1, self.span)
        planes = np.arange(0, 8, self.bits, dtype=np.uint8)[:, None]
        split: np.ndarray = held >> planes & np.uint8((1 << self.bits) - 1)
        return split.reshape(len(blocks), self.symbols)

    def put(self, symbols: np.ndarray, blocks: np.ndarray) -> None:
        """Write this part of every symbol, as `take` returned it, to `blocks`."""
        if self.bits != 8:
            split = symbols.reshape(len(blocks), self.nbytes // self.span, -1, self.span)
            joined = split[:, :, 0].copy()
            for plane in range(1, 8 // self.bits):
                joined |= split[:, :, plane] << np.uint8(plane * self.bits)
            symbols = joined.reshape(len(blocks), self.nbytes)
        blocks[:, self.at : self.at + self.nbytes] = symbols


@dataclass(frozen=True, slots=True)
class Layout:
    """The blocks of a tensor.

    Attributes:
        block: Bytes of a block.
        fields: Parts of each field.
    """

    block: int
    fields: tuple[tuple[Part, ...], ...]

    def rest(self) -> np.ndarray:
        """Return which bytes of a block no field holds, bool."""
        out = np.ones(self.block, dtype=np.bool_)
        for part in self.parts():
            out[part.at : part.at + part.nbytes] = False
        return out

    def rest_nbytes(self) -> int:
        """Return how many bytes of a block no field holds."""
        return self.block - sum(part.nbytes for part in self.parts())

    def parts(self) -> list[Part]:
        """Return the parts of all fields."""
        return [part for field in self.fields for part in field]

    def width(self, field: int) -> int:
        """Return the bits of a symbol."""
        return sum(part.bits for part in self.fields[field])

    def count(self, field: int, blocks: int) -> int:
        """Return the symbols of a field in `blocks` blocks."""
        return self.fields[field][0].symbols * blocks

    def chunks(self, blocks: int) -> list[int]:
        """Return the number of each field's first chunk, and of all chunks at the end."""
        out = [0]
        for field in range(len(self.fields)):
            out.append(out[-1] + -(-self.count(field, blocks) // CHUNK))
        return out

    def piece(self) -> int:
        """Return the least blocks that hold whole chunks of every field."""
        counts = [self.count(field, 1) for field in range(len(self.fields))]
        return math.lcm(*(CHUNK // math.gcd(CHUNK, count) for count in counts))

    def take(self, field: int, blocks: np.ndarray) -> np.ndarray:
        """Return the symbols of a field, u8, flat."""
        out, shift = None, 0
        for part in self.fields[field]:
            found = part.take(blocks)
            out = found if out is None else out | found << np.uint8(shift)
            shift += part.bits
        assert out is not None
        return np.ascontiguousarray(out).reshape(-1)

    def put(self, field: int, symbols: np.ndarray, blocks: np.ndarray) -> None:
        """Write the symbols of a field, as `take` returned them, to `blocks`."""
        for part in self.fields[field]:
            part.put(symbols.reshape(len(blocks), -1) & np.uint8((1 << part.bits) - 1), blocks)
            symbols = symbols >> np.uint8(part.bits % 8)

    def check(self) -> None:
        """Raise `FormatError` unless every part lies in the block, and no two share a byte."""
        if not 1 <= self.block <= MAX_BLOCK:
            raise FormatError(f"block must be 1..{MAX_BLOCK} bytes, got {self.block}")
        if not 1 <= len(self.fields) <= MAX_FIELDS:
            raise FormatError(f"fields must be 1..{MAX_FIELDS}, got {len(self.fields)}")
        taken: set[int] = set()
        for field in self.fields:
            if not 1 <= len(field) <= MAX_PARTS:
                raise FormatError(f"a field must have 1..{MAX_PARTS} parts, got {len(field)}")
            for part in field:
                if part.bits not in WIDTHS:
                    raise FormatError(f"bits of a part must be one of {WIDTHS}, got {part.bits}")
                stop = part.at + part.nbytes
                if not (0 <= part.at < stop <= self.block):
                    raise FormatError(f"a part must lie in its block of {self.block} bytes")
                if part.span < 1 or part.nbytes % part.span:
                    raise FormatError(f"span {part.span} must divide {part.nbytes} bytes")
                if taken & set(range(part.at, stop)):
                    raise FormatError("two parts must not share a byte")
                taken |= set(range(part.at, stop))
            if len({part.symbols for part in field}) != 1 or sum(p.bits for p in field) > 8:
                raise FormatError("parts of a field must have equally many symbols, 8 bits at most")


@dataclass(frozen=True, slots=True)
class Fields:
    """Parameters of codec `fields`.

    Attributes:
        layout: Where the symbols are.
        words: 16-bit words of all chunks.
    """

    layout: Layout
    words: int

    def blocks(self, nbytes: int) -> int:
        """Return the blocks of a tensor of `nbytes`."""
        return nbytes // self.layout.block

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form that a packed file's header holds."""
        fields = [
            [[part.at, part.nbytes, part.bits, part.span] for part in field]
            for field in self.layout.fields
        ]
        return {"block": self.layout.block, "fields": fields, "words": self.words}

    @classmethod
    def from_dict(cls, members: Mapping[str, Any]) -> "Fields":
        """Return the parameters that `members` describes.

        Raises:
            FormatError: A member is missing or of the wrong type; `check` looks at the ranges.
        """
        block, words, fields = (members.get(key) for key in ("block", "words", "fields"))
        if not _is_number(block) or not _is_number(words):
            raise FormatError("block and words must be integers of 63 bits, not negative")
        if not isinstance(fields, list) or not all(isinstance(field, list) for field in fields):
            raise FormatError("fields must be a list of lists of parts")
        for part in (part for field in fields for part in field):
            if not (isinstance(part, list) and len(part) == 4 and all(map(_is_number, part))):
                raise FormatError("a part must be four integers: [at, nbytes, bits, span]")
        parts = tuple(tuple(Part(*part) for part in field) for field in fields)
        return cls(Layout(int(block or 0), parts), int(words or 0))

    def check(self, nbytes: int) -> None:
        """Raise `FormatError` unless a tensor of `nbytes` can be stored so."""
        self.layout.check()
        if nbytes < 1 or nbytes % self.layout.block:
            raise FormatError(f"{nbytes} bytes must be whole blocks of {self.layout.block}")
        blocks = self.blocks(nbytes)
        counts = [self.layout.count(field, blocks) for field in range(len(self.layout.fields))]
        room = min(MAX_WORDS, sum(LANES * -(-count // LANES) for count in counts))
        if not 0 <= self.words <= room:
            raise FormatError(f"words must be 0..{room}, got {self.words}")


def _is_number(value: object) -> bool:
    return type(value) is int and 0 <= value < 1 << 63


def array_shapes(fields: Fields, nbytes: int) -> list[tuple[str, str, tuple[int, ...]]]:
    """Return suffix, safetensors code and shape of the stored arrays, in file order."""
    layout, blocks = fields.layout, fields.blocks(nbytes)
    chunks = layout.chunks(blocks)[-1]
    symbols = sum(1 << layout.width(field) for field in range(len(layout.fields)))
    out: list[tuple[str, str, tuple[int, ...]]] = [
        ("frequencies", "U16", (symbols,)),
        ("chunk_offsets", "U32", (chunks + 1,)),
        ("states", "U32", (chunks, LANES)),
        ("words", "U16", (fields.words,)),
    ]
    if layout.rest_nbytes():
        out.append(("rest", "U8", (blocks, layout.rest_nbytes())))
    return out
