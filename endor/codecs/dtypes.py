"""Element types, and how their bits split into sign, exponent and mantissa."""

import math
from dataclasses import dataclass

import numpy as np

from endor.errors import DTypeError


@dataclass(frozen=True, slots=True)
class DType:
    """One element type of the safetensors format.

    The bits of an element are `[sign | exponent | mantissa]`. The `exp` codec windows the exponent
    field and keeps the rest (`sign << mantissa_bits | mantissa`) as it is. For the 8-bit integers
    the whole byte is the exponent field and the rest is empty.

    Attributes:
        name: The safetensors code, such as `"BF16"`.
        itemsize: Bytes per element; 1 where elements are narrower (`bits`).
        exponent_bits: Width of the exponent field; 0 where only the dense codec applies.
        mantissa_bits: Width of the mantissa field.
        signed: Whether a sign bit stands above the exponent.
        bits: Width of an element that is no whole bytes; its tensors are handled as flat bytes.
    """

    name: str
    itemsize: int
    exponent_bits: int = 0
    mantissa_bits: int = 0
    signed: bool = True
    bits: int = 0

    def units(self, numel: int) -> int:
        """Return how many items of `uint` hold `numel` elements."""
        return -(-numel * self.bits // 8) if self.bits else numel

    def nbytes(self, numel: int) -> int:
        """Return the bytes of `numel` elements."""
        return self.units(numel) * self.itemsize

    def unit_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape, in items of `uint`, of a dense tensor of `shape`."""
        return (self.units(math.prod(shape)),) if self.bits else shape

    @property
    def packable(self) -> bool:
        """Whether the sparse and exponent codecs apply."""
        return self.exponent_bits > 0

    @property
    def rest_bits(self) -> int:
        """Width of sign and mantissa together."""
        return self.mantissa_bits + (1 if self.signed else 0)

    @property
    def uint(self) -> np.dtype[np.unsignedinteger]:
        """The unsigned numpy type of the same width, in which all codecs work."""
        return np.dtype(f"<u{self.itemsize}")

    def exponents(self, bits: np.ndarray) -> np.ndarray:
        """Return the exponent field of each element of `bits`, as unsigned integers."""
        mask = self.uint.type((1 << self.exponent_bits) - 1)
        field: np.ndarray = (bits >> self.uint.type(self.mantissa_bits)) & mask
        return field

    def rests(self, bits: np.ndarray) -> np.ndarray:
        """Return `sign << mantissa_bits | mantissa` of each element of `bits`."""
        if not self.rest_bits:
            return np.zeros_like(bits)
        uint = self.uint.type
        mantissa = bits & uint((1 << self.mantissa_bits) - 1)
        sign = bits >> uint(8 * self.itemsize - 1)
        joined: np.ndarray = (sign << uint(self.mantissa_bits)) | mantissa
        return joined

    def join(self, exponents: np.ndarray, rests: np.ndarray) -> np.ndarray:
        """Return elements from exponent fields and rests: the inverse of the two above."""
        uint = self.uint.type
        bits: np.ndarray = exponents.astype(self.uint) << uint(self.mantissa_bits)
        if self.rest_bits:
            rests = rests.astype(self.uint)
            bits |= rests & uint((1 << self.mantissa_bits) - 1)
            bits |= (rests >> uint(self.mantissa_bits)) << uint(8 * self.itemsize - 1)
        return bits


DTYPES: dict[str, DType] = {
    item.name: item
    for item in (
        DType("BF16", 2, 8, 7),
        DType("F16", 2, 5, 10),
        DType("F32", 4, 8, 23),
        DType("F8_E4M3", 1, 4, 3),
        DType("F8_E5M2", 1, 5, 2),
        DType("I8", 1, 8, 0, signed=False),
        DType("U8", 1, 8, 0, signed=False),
        DType("BOOL", 1),
        DType("I16", 2),
        DType("U16", 2),
        DType("I32", 4),
        DType("U32", 4),
        DType("I64", 8),
        DType("U64", 8),
        DType("F64", 8),
        DType("F8_E8M0", 1),
        DType("C64", 8),
        DType("F8_E4M3FNUZ", 1),
        DType("F8_E5M2FNUZ", 1),
        DType("F4", 1, bits=4),
        DType("F6_E2M3", 1, bits=6),
        DType("F6_E3M2", 1, bits=6),
    )
}


def dtype(name: str) -> DType:
    """Return the element type called `name`.

    Raises:
        DTypeError: The name is not one that this version knows.
    """
    try:
        return DTYPES[name]
    except KeyError:
        known = ", ".join(DTYPES)
        raise DTypeError(f"dtype must be one of {known}; got {name!r}") from None
