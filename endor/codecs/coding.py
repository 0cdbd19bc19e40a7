"""How codec `int` stores a tensor: the parameters of its code and of its steps."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from endor.codecs.dtypes import DType
from endor.codecs.huffman import MAX_LENGTH, MAX_SYMBOLS
from endor.errors import FormatError

MAX_CODE = 1 << 24
"""Largest magnitude of a code: float32 holds every smaller integer."""

MAX_SHIFT = 8
MAX_STREAM = (1 << 32) - 1

PAIR_BITS = 4
"""Bits of each code of a pair inside its symbol."""

VALUE_DTYPES = ("BF16", "F16", "F32")
STEP_DTYPES = ("F16", "BF16", "F32")
STEP_EXPONENTS = range(-160, 161)

ArrayShape = tuple[str, str, tuple[int, ...]]
"""Suffix, safetensors code and shape of a stored array."""


@dataclass(frozen=True, slots=True)
class Coding:
    """Parameters of codec `int`.

    A code is `(base + symbol << shift) + low`, `low` being `shift` bits as they are; of a pair it
    is `base` plus either half of the symbol.

    Attributes:
        base: Code of symbol 0, before the shift.
        symbols: Entries of the table of code lengths, 1..256.
        shift: Low bits of every code that are stored uncoded.
        pair: Whether a symbol stands for two codes of 4 bits, the first one lower.
        stream_nbytes: Bytes of all code words.
        step_dtype: Stored type of the steps.
        step_exponent: Every step is its stored value times 2 to this.
        step_block: Rows and columns that share a step.
    """

    base: int
    symbols: int
    shift: int
    pair: bool
    stream_nbytes: int
    step_dtype: str
    step_exponent: int
    step_block: tuple[int, int]

    @property
    def reach(self) -> int:
        """Codes of the window: base to base + reach, before the shift."""
        return 1 << PAIR_BITS if self.pair else self.symbols

    def step_shape(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """Return the shape of the steps of a tensor of `shape`."""
        rows, cols = matrix_shape(shape)
        return -(-rows // self.step_block[0]), -(-cols // self.step_block[1])

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form that a packed file's header holds."""
        return {
            "base": self.base,
            "symbols": self.symbols,
            "shift": self.shift,
            "pair": self.pair,
            "stream": self.stream_nbytes,
            "steps": {
                "dtype": self.step_dtype,
                "exponent": self.step_exponent,
                "block": list(self.step_block),
            },
        }

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> "Coding":
        """Return the coding that `fields` describes.

        Raises:
            FormatError: A field is missing or of the wrong type; `check` looks at the ranges.
        """
        steps = fields.get("steps")
        if not isinstance(steps, Mapping):
            raise FormatError(f"steps must be an object, got {type(steps).__name__}")
        block = steps.get("block")
        if not isinstance(block, list) or len(block) != 2:
            raise FormatError("steps: block must be two sizes")
        numbers = {key: fields.get(key) for key in ("base", "symbols", "shift", "stream")}
        numbers |= {"exponent": steps.get("exponent"), "rows": block[0], "cols": block[1]}
        for key, value in numbers.items():
            if type(value) is not int or abs(value) >= 1 << 63:
                raise FormatError(f"{key} must be an integer of 64 bits, got {type(value).__name__}")
        pair = fields.get("pair")
        if not isinstance(pair, bool):
            raise FormatError(f"pair must be true or false, got {type(pair).__name__}")
        if steps.get("dtype") not in STEP_DTYPES:
            raise FormatError(f"steps: dtype must be one of {', '.join(STEP_DTYPES)}")
        return cls(
            numbers["base"],
            numbers["symbols"],
            numbers["shift"],
            pair,
            numbers["stream"],
            steps["dtype"],
            numbers["exponent"],
            (block[0], block[1]),
        )

    def check(self, shape: tuple[int, ...], dtype: DType) -> None:
        """Raise `FormatError` unless a tensor of `shape` and `dtype` can be stored so."""
        if dtype.name not in VALUE_DTYPES:
            raise FormatError(f"codec int takes {', '.join(VALUE_DTYPES)}, not {dtype.name}")
        if not 1 <= self.symbols <= MAX_SYMBOLS:
            raise FormatError(f"symbols must be 1..{MAX_SYMBOLS}, got {self.symbols}")
        if not 0 <= self.shift <= MAX_SHIFT:
            raise FormatError(f"shift must be 0..{MAX_SHIFT}, got {self.shift}")
        numel = math.prod(shape)
        if self.pair and (self.shift or numel % 2):
            raise FormatError("pairs take no shift and an even number of elements")
        first, last = self.base << self.shift, (self.base + self.reach << self.shift) - 1
        if first < -MAX_CODE or last > MAX_CODE:
            raise FormatError(f"codes must lie within +-{MAX_CODE}, got {first}..{last}")
        if not 0 <= self.stream_nbytes <= MAX_STREAM:
            raise FormatError(f"stream must have 0..{MAX_STREAM} bytes, got {self.stream_nbytes}")
        if self.stream_nbytes > numel * (MAX_LENGTH + MAX_SHIFT):  # a bound, for cheap arithmetic
            raise FormatError(f"stream of {self.stream_nbytes} bytes exceeds {numel} elements")
        if self.step_exponent not in STEP_EXPONENTS or (
            self.step_exponent and self.step_dtype != "F16"
        ):
            raise FormatError(
                f"steps: exponent must be {STEP_EXPONENTS[0]}..{STEP_EXPONENTS[-1]} with F16 and 0 "
                f"with others, got {self.step_exponent} with {self.step_dtype}"
            )
        limits = (max(size, 1) for size in matrix_shape(shape))
        for size, limit in zip(self.step_block, limits, strict=True):
            if not 1 <= size <= limit:
                raise FormatError(f"steps: block size must be 1..{limit}, got {size}")


def matrix_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """Return `shape` as rows and columns: the last dimension is that of columns."""
    return (math.prod(shape[:-1]), shape[-1]) if shape else (1, 1)


def array_shapes(
    coding: Coding, shape: tuple[int, ...], n_tiles: int, n_groups: int, patches: int
) -> list[ArrayShape]:
    """Return the stored arrays of a tensor in codec `int`, in file order."""
    out: list[ArrayShape] = [
        ("steps", coding.step_dtype, coding.step_shape(shape)),
        ("code_lengths", "U8", (coding.symbols,)),
        ("group_offsets", "U32", (n_groups + 1,)),
        ("tile_starts", "U16", (n_tiles,)),
        ("stream", "U8", (coding.stream_nbytes,)),
    ]
    if patches:
        out += [
            ("patch_offsets", "U32", (n_groups + 1,)),
            ("patch_ranks", "U16", (patches,)),
            ("patch_codes", "I32", (patches,)),
        ]
    return out
