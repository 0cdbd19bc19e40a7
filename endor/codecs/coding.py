"""How codec `int` stores a tensor: the parameters of its code and of its steps."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from endor.codecs.dtypes import DType
from endor.errors import FormatError

MAX_CODE = 1 << 24
"""Largest magnitude of a code: float32 holds every smaller integer."""

LANES = 32
"""Coders of a chunk that share one stream of words: the threads of a warp."""

CHUNK = 1024 * LANES
"""Weights that are coded together: the unit with its own states and its own start."""

SCALE_BITS = 12
SCALE = 1 << SCALE_BITS
"""What the frequencies of a tensor's symbols sum to: the entries of a decoder's table."""

LOWEST = 1 << 16
"""The least state of a coder between symbols, and its state after the last one."""

MAX_SYMBOLS = 256
MAX_SHIFT = 8
MAX_WORDS = (1 << 32) - 1

VALUE_DTYPES = ("BF16", "F16", "F32")
STEP_DTYPES = ("F16", "BF16", "F32")
STEP_EXPONENTS = range(-160, 161)

ArrayShape = tuple[str, str, tuple[int, ...]]
"""Suffix, safetensors code and shape of a stored array."""


@dataclass(frozen=True, slots=True)
class Coding:
    """Parameters of codec `int`: a code is `(base + symbol << shift) + low`.

    With `levels` an element is a level times a step, and the symbol is the level's number.

    Attributes:
        base: Code of symbol 0, before the shift.
        symbols: Entries of the table of frequencies, 2..256.
        shift: Low bits of every code that are stored as they are.
        words: 16-bit words of all chunks.
        step_dtype: Stored type of the steps.
        step_exponent: Every step is its stored value times 2 to this.
        step_block: Rows and columns that share a step.
        levels: Whether a table of levels is stored; base and shift are then 0.
    """

    base: int
    symbols: int
    shift: int
    words: int
    step_dtype: str
    step_exponent: int
    step_block: tuple[int, int]
    levels: bool = False

    def step_shape(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """Return the shape of the steps of a tensor of `shape`."""
        rows, cols = matrix_shape(shape)
        return -(-rows // self.step_block[0]), -(-cols // self.step_block[1])

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form that a packed file's header holds."""
        out: dict[str, Any] = {
            "base": self.base,
            "symbols": self.symbols,
            "shift": self.shift,
            "words": self.words,
            "steps": {
                "dtype": self.step_dtype,
                "exponent": self.step_exponent,
                "block": list(self.step_block),
            },
        }
        return out | {"levels": True} if self.levels else out

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
        numbers: dict[str, Any] = {
            key: fields.get(key) for key in ("base", "symbols", "shift", "words")
        }
        numbers |= {"exponent": steps.get("exponent"), "rows": block[0], "cols": block[1]}
        for key, value in numbers.items():
            if type(value) is not int or abs(value) >= 1 << 63:
                raise FormatError(
                    f"{key} must be an integer of 64 bits, got {type(value).__name__}"
                )
        if steps.get("dtype") not in STEP_DTYPES:
            raise FormatError(f"steps: dtype must be one of {', '.join(STEP_DTYPES)}")
        if fields.get("levels", True) is not True:
            raise FormatError("levels must be true where it is there")
        return cls(
            numbers["base"],
            numbers["symbols"],
            numbers["shift"],
            numbers["words"],
            steps["dtype"],
            numbers["exponent"],
            (block[0], block[1]),
            "levels" in fields,
        )

    def check(self, shape: tuple[int, ...], dtype: DType) -> None:
        """Raise `FormatError` unless a tensor of `shape` and `dtype` can be stored so."""
        if dtype.name not in VALUE_DTYPES:
            raise FormatError(f"codec int takes {', '.join(VALUE_DTYPES)}, not {dtype.name}")
        if not 2 <= self.symbols <= MAX_SYMBOLS:
            raise FormatError(f"symbols must be 2..{MAX_SYMBOLS}, got {self.symbols}")
        if not 0 <= self.shift <= MAX_SHIFT:
            raise FormatError(f"shift must be 0..{MAX_SHIFT}, got {self.shift}")
        if self.levels and (self.base or self.shift):
            raise FormatError("base and shift must be 0 where levels are stored")
        first, last = self.base << self.shift, (self.base + self.symbols << self.shift) - 1
        if abs(self.base) > MAX_CODE or first < -MAX_CODE or last > MAX_CODE:
            raise FormatError(f"codes must lie within +-{MAX_CODE}, got {first}..{last}")
        room = min(MAX_WORDS, LANES * -(-math.prod(shape) // LANES))
        if not 0 <= self.words <= room:
            raise FormatError(f"words must be 0..{room}, got {self.words}")
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


def array_shapes(coding: Coding, shape: tuple[int, ...], patches: int) -> list[ArrayShape]:
    """Return the stored arrays of a tensor in codec `int`, in file order."""
    numel = math.prod(shape)
    n_chunks = -(-numel // CHUNK)
    out: list[ArrayShape] = [
        ("steps", coding.step_dtype, coding.step_shape(shape)),
        ("frequencies", "U16", (coding.symbols,)),
        *([("levels", "F32", (coding.symbols,))] if coding.levels else []),
        ("chunk_offsets", "U32", (n_chunks + 1,)),
        ("states", "U32", (n_chunks, LANES)),
        ("words", "U16", (coding.words,)),
    ]
    if coding.shift:
        out.append(("low_bits", "U8", (-(-numel // LANES) * LANES // 8 * coding.shift,)))
    if patches:
        out += [
            ("patch_offsets", "U32", (n_chunks + 1,)),
            ("patch_ranks", "U16", (patches,)),
            ("patch_codes", "I32", (patches,)),
        ]
    return out
