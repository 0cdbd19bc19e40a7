"""What is stored for one tensor: shape, codec parameters and the arrays that follow from them."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import numpy as np

from endor.codecs import layout
from endor.codecs.bundles import Bundles
from endor.codecs.coding import Coding, array_shapes
from endor.codecs.dtypes import DTYPES, DType, dtype
from endor.codecs.layout import Fields
from endor.errors import FormatError

TILE = 1024
"""Weights per tile: the unit with its own entry in `tile_offsets`."""

GROUP = 8 * TILE
"""Weights per patch group: the unit with its own entry in `patch_offsets`."""

BITMAP_TILE_BYTES = TILE // 8
MAX_NUMEL = 1 << 40
MAX_NNZ = (1 << 32) - 1

Codec = Literal["dense", "raw", "exp", "int", "fields"]
CodecChoice = Literal["auto", "dense", "raw", "exp"]
CODECS: tuple[Codec, ...] = get_args(Codec)


@dataclass(frozen=True, slots=True)
class ArraySpec:
    """One stored array of a packed tensor.

    Attributes:
        suffix: The array's role: `""` for a dense tensor, else `"bitmap"`, `"values"`, ...
        dtype: Safetensors code of the stored array.
        shape: Its shape, row-major.
    """

    suffix: str
    dtype: DType
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return self.dtype.nbytes(math.prod(self.shape))

    @property
    def unit_shape(self) -> tuple[int, ...]:
        """Its shape in memory: in items of `dtype.uint`."""
        return self.dtype.unit_shape(self.shape)


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Everything about a stored tensor but its bytes.

    Attributes:
        shape: Dense shape, any number of dimensions.
        dtype: Dense element type.
        codec: `"dense"` (as it is), `"raw"` (bitmap and values), `"exp"` (exponent window),
            `"int"` (integer codes times steps) or `"fields"` (packed codes of another format).
        bitmap: Whether only the elements with a set bit are stored.
        nnz: Stored elements; `numel` without a bitmap.
        k: Bits of the exponent code (`exp` only).
        base: First exponent of the window (`exp` only).
        patches: Stored elements whose exponent lies outside the window (`exp`), or whose code has
            no word (`int`).
        coding: How the codes are stored (`int` only).
        fields: Where the symbols lie (`fields` only).
        transposed: Whether what is stored is the transposed matrix, so that a column lies together
            (`raw` and `exp` only). `shape` is that of the tensor all the same.
        bundles: How the rows of the transposed matrix are bundled; None where each array is whole.
    """

    shape: tuple[int, ...]
    dtype: DType
    codec: Codec
    bitmap: bool
    nnz: int
    k: int = 0
    base: int = 0
    patches: int = 0
    coding: Coding | None = None
    fields: Fields | None = None
    transposed: bool = False
    bundles: Bundles | None = None

    @property
    def stored(self) -> "TensorSpec":
        """The spec of the matrix whose elements the arrays hold in row-major order."""
        if not self.transposed:
            return self
        return replace(self, shape=self.shape[::-1], transposed=False, bundles=None)

    @property
    def decoded(self) -> "TensorSpec":
        """The same with its entropy code undone: bitmap and elements; itself if it has none."""
        if self.codec != "exp" or not self.bitmap or self.transposed:
            return self
        return replace(self, codec="raw", k=0, base=0, patches=0)

    def turned(self) -> "TensorSpec":
        """Return the spec of the transposed matrix, in the same arrays."""
        return replace(self, shape=self.shape[::-1], transposed=not self.transposed)

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def n_tiles(self) -> int:
        return -(-self.numel // TILE)

    @property
    def n_groups(self) -> int:
        return -(-self.numel // GROUP)

    @property
    def byte_planes(self) -> int:
        """Whole bytes of each stored element that the `exp` codec keeps uncoded."""
        return self.dtype.rest_bits // 8

    @property
    def bit_planes(self) -> int:
        """Bits of each stored element that the `exp` codec keeps as planes."""
        return self.k + self.dtype.rest_bits % 8

    @property
    def plane_nbytes(self) -> int:
        """Bytes of one bit plane: whole 64-bit words."""
        return 8 * (-(-self.nnz // 64))

    @property
    def arrays(self) -> tuple[ArraySpec, ...]:
        """The stored arrays, in file order."""
        u8, u16, u32 = DTYPES["U8"], DTYPES["U16"], DTYPES["U32"]
        if self.codec == "dense":
            return (ArraySpec("", self.dtype, self.shape),)
        if self.coding is not None:
            shapes = array_shapes(self.coding, self.shape, self.patches)
            return tuple(ArraySpec(suffix, DTYPES[code], shape) for suffix, code, shape in shapes)
        if self.fields is not None:
            shapes = layout.array_shapes(self.fields, self.dense_nbytes)
            return tuple(ArraySpec(suffix, DTYPES[code], shape) for suffix, code, shape in shapes)
        if self.bundles is not None:
            count = self.bundles.count(self.shape[1])
            offsets = ArraySpec("bundle_offsets", u32, (count + 1,))
            return offsets, ArraySpec("bundles", u8, (self.bundles.nbytes,))
        out: list[ArraySpec] = []
        if self.bitmap:
            out.append(ArraySpec("tile_offsets", u32, (self.n_tiles + 1,)))
            out.append(ArraySpec("bitmap", u8, (self.n_tiles * BITMAP_TILE_BYTES,)))
        if self.codec == "raw":
            out.append(ArraySpec("values", self.dtype, (self.nnz,)))
            return tuple(out)
        if self.byte_planes:
            out.append(ArraySpec("bytes", u8, (self.byte_planes, self.nnz)))
        out.append(ArraySpec("planes", u8, (self.bit_planes, self.plane_nbytes)))
        if self.patches:
            out.append(ArraySpec("patch_offsets", u32, (self.n_groups + 1,)))
            out.append(ArraySpec("patch_ranks", u16, (self.patches,)))
            out.append(ArraySpec("patch_exponents", u8, (self.patches,)))
        return tuple(out)

    @property
    def nbytes(self) -> int:
        """Bytes of all stored arrays, without alignment."""
        return sum(array.nbytes for array in self.arrays)

    @property
    def dense_nbytes(self) -> int:
        return self.dtype.nbytes(self.numel)

    @property
    def units(self) -> int:
        """Items of `dtype.uint` in the dense form: `numel`, or bytes of narrower elements."""
        return self.dtype.units(self.numel)

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per element of the dense tensor; 0 for an empty one."""
        return 8 * self.nbytes / self.numel if self.numel else 0.0

    @property
    def density(self) -> float:
        """`nnz / numel`; 1 for an empty tensor."""
        return self.nnz / self.numel if self.numel else 1.0

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form that a packed file's header holds."""
        out: dict[str, Any] = {
            "shape": list(self.shape),
            "dtype": self.dtype.name,
            "codec": self.codec,
        }
        if self.coding is not None:
            return out | {"patches": self.patches} | self.coding.to_dict()
        if self.fields is not None:
            return out | self.fields.to_dict()
        if self.codec != "dense":
            out |= {"bitmap": self.bitmap, "nnz": self.nnz}
        if self.codec == "exp":
            out |= {"k": self.k, "base": self.base, "patches": self.patches}
        if self.transposed:
            out["transposed"] = True
        if self.bundles is not None:
            out["bundles"] = self.bundles.to_dict()
        return out

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> "TensorSpec":
        """Return the spec that `fields` describes, after checking every field.

        Raises:
            FormatError: A field is missing, of the wrong type, or out of range.
        """
        shape = fields.get("shape")
        if not isinstance(shape, list) or not all(_is_count(size) for size in shape):
            raise FormatError(f"shape must be a list of sizes, got {shape!r}")
        name, codec = fields.get("dtype"), fields.get("codec")
        if not isinstance(name, str) or name not in DTYPES:
            raise FormatError(f"unknown dtype {name!r}: a newer Endor may read it")
        if codec not in CODECS:
            raise FormatError(f"unknown codec {codec!r}: a newer Endor may read it")
        numel = math.prod(shape)
        if math.prod(size or 1 for size in shape) > MAX_NUMEL:  # strides overflow even without data
            raise FormatError(
                f"shape {shape} has {numel} elements; at most {MAX_NUMEL} are allowed"
            )
        transposed = fields.get("transposed", False)
        if not isinstance(transposed, bool):
            raise FormatError(f"transposed must be true or false, got {transposed!r}")
        if transposed and codec not in ("raw", "exp"):
            raise FormatError(f"codec {codec} takes no transposed matrix")
        if codec == "dense":
            return cls(tuple(shape), dtype(name), codec, bitmap=False, nnz=numel)
        if codec == "int":
            return cls._from_int(tuple(shape), dtype(name), fields)
        if codec == "fields":
            parsed = Fields.from_dict(fields)
            spec = cls(tuple(shape), dtype(name), codec, False, numel, fields=parsed)
            spec.check()
            return spec
        bitmap = fields.get("bitmap")
        if not isinstance(bitmap, bool):
            raise FormatError(f"bitmap must be true or false, got {bitmap!r}")
        counts = {key: fields.get(key, 0) for key in ("k", "base", "patches")}
        counts["nnz"] = fields.get("nnz")
        for key, value in counts.items():
            if not _is_count(value):
                raise FormatError(f"{key} must be a non-negative integer, got {value!r}")
        bundles = Bundles.from_dict(fields["bundles"]) if "bundles" in fields else None
        form = tuple(shape), dtype(name), codec, bitmap
        spec = cls(*form, **counts, transposed=transposed, bundles=bundles)
        spec.check()
        return spec

    @classmethod
    def _from_int(
        cls, shape: tuple[int, ...], dtype: DType, fields: Mapping[str, Any]
    ) -> "TensorSpec":
        patches, numel = fields.get("patches", 0), math.prod(shape)
        if not _is_count(patches):
            raise FormatError(f"patches must be a non-negative integer, got {patches!r}")
        coding = Coding.from_dict(fields)
        spec = cls(shape, dtype, "int", False, numel, patches=patches, coding=coding)
        spec.check()
        return spec

    def check(self) -> None:
        """Raise `FormatError` unless the fields agree with each other."""
        if (self.codec == "int") != (self.coding is not None):
            raise FormatError(f"codec {self.codec} and its coding contradict each other")
        if (self.codec == "fields") != (self.fields is not None):
            raise FormatError(f"codec {self.codec} and its fields contradict each other")
        if self.fields is not None:
            if self.bitmap or self.k or self.base or self.patches or self.nnz != self.numel:
                raise FormatError("codec fields takes no bitmap, window or patches")
            self.fields.check(self.dense_nbytes)
            return
        if self.transposed and (self.codec not in ("raw", "exp") or len(self.shape) != 2):
            raise FormatError(
                f"only a matrix in codec raw or exp is stored transposed, got {self.codec} of "
                f"shape {list(self.shape)}"
            )
        if self.bundles is not None:
            if not self.transposed:
                raise FormatError("only a matrix that is stored transposed takes bundles")
            self.bundles.check(self.shape[1])
        if not self.dtype.packable and self.codec != "dense":
            raise FormatError(f"dtype {self.dtype.name} takes only the dense codec")
        if self.nnz > self.numel or (not self.bitmap and self.nnz != self.numel):
            raise FormatError(f"nnz {self.nnz} does not fit {self.numel} elements")
        if self.bitmap and self.nnz > MAX_NNZ:
            raise FormatError(f"nnz {self.nnz} exceeds {MAX_NNZ}; split the tensor")
        if self.codec == "raw" and not self.bitmap:
            raise FormatError("codec raw needs a bitmap; without one the codec is dense")
        if self.coding is not None:
            if self.bitmap or self.k or self.base:
                raise FormatError("codec int takes no bitmap and no exponent window")
            if self.coding.levels and self.patches:
                raise FormatError("codes of levels take no patches")
            if self.patches > min(self.nnz, MAX_NNZ):
                raise FormatError(f"{self.patches} patches exceed nnz {self.nnz} or {MAX_NNZ}")
            self.coding.check(self.shape, self.dtype)
            return
        if self.codec == "exp":
            if not 1 <= self.k <= self.dtype.exponent_bits:
                raise FormatError(f"k must be 1..{self.dtype.exponent_bits}, got {self.k}")
            if not 0 <= self.base <= self.max_base:
                raise FormatError(f"base must be 0..{self.max_base}, got {self.base}")
            if self.patches > self.nnz:
                raise FormatError(f"{self.patches} patches exceed nnz {self.nnz}")
            if self.patches > MAX_NNZ:
                raise FormatError(f"{self.patches} patches exceed {MAX_NNZ}; split the tensor")
        elif self.k or self.base or self.patches:
            raise FormatError(f"codec {self.codec} takes no exponent window")

    @property
    def max_base(self) -> int:
        """Largest window start: windows of floats end at the last exponent, of bytes wrap."""
        span = 1 << self.dtype.exponent_bits
        return span - (1 << self.k) if self.dtype.signed else span - 1


@dataclass(frozen=True, slots=True, weakref_slot=True)
class Encoded:
    """A stored tensor on the host: its spec and its arrays.

    Attributes:
        spec: Shape, codec and sizes.
        arrays: Array per suffix, C-contiguous, in the unsigned type of the array's width.
    """

    spec: TensorSpec
    arrays: Mapping[str, np.ndarray]

    @property
    def nbytes(self) -> int:
        return self.spec.nbytes


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MAX_NUMEL
