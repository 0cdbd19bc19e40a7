"""GGUF files, llama.cpp's format: blocks of codes and scales, as tensors of bytes.

Read after the format's specification (github.com/ggml-org/ggml, docs/gguf.md). What is not the data
of a tensor is kept as it is: the head as the tensor `gguf.head`, bytes past the last tensor as
`gguf.tail`; unpacking puts the same file together again.
"""

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from endor.checkpoint.directory import fingerprint_files
from endor.checkpoint.sources.contract import SourceTensor
from endor.codecs import DTYPES
from endor.codecs.layout import Layout, Part
from endor.errors import CheckpointError, FormatError
from endor.storage.positioned import OpenFiles

MAGIC = b"GGUF"
HEAD, TAIL = "gguf.head", "gguf.tail"
MAX_HEAD_BYTES = 1 << 28

PLAIN = {0: "F32", 1: "F16", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64", 30: "BF16"}
"""Types whose elements safetensors knows."""

BLOCKS = {
    2: (32, 18),
    3: (32, 20),
    6: (32, 22),
    7: (32, 24),
    8: (32, 34),
    10: (256, 84),
    11: (256, 110),
    12: (256, 144),
    13: (256, 176),
    14: (256, 210),
    15: (256, 292),
    16: (256, 66),
    17: (256, 74),
    18: (256, 98),
    19: (256, 50),
    20: (32, 18),
    21: (256, 110),
    22: (256, 82),
    23: (256, 136),
    29: (256, 56),
    34: (256, 54),
    35: (256, 66),
    39: (32, 17),
}
"""Elements and bytes of a block, by type."""


def _halves(*places: int) -> list[tuple[Part, ...]]:
    """Return a field for each upper byte of a float16 scale: sign, exponent, two bits more."""
    return [(Part(place + 1, 1, 8),) for place in places]


def _layout(block: int, *fields: tuple[Part, ...]) -> Layout:
    return Layout(block, fields)


_NIBBLES = _layout(18, (Part(2, 16, 4, 16),), *_halves(0))
LAYOUTS = {
    2: _NIBBLES,
    3: _layout(20, (Part(4, 16, 4, 16),), *_halves(0, 2)),
    6: _layout(22, (Part(6, 16, 4, 16), Part(2, 4, 1)), *_halves(0)),
    7: _layout(24, (Part(8, 16, 4, 16), Part(4, 4, 1)), *_halves(0, 2)),
    8: _layout(34, (Part(2, 32, 8),), *_halves(0)),
    10: _layout(84, (Part(16, 64, 2, 32),), (Part(0, 16, 8),), *_halves(80, 82)),
    11: _layout(110, (Part(32, 64, 2, 32), Part(0, 32, 1, 32)), (Part(96, 12, 8),), *_halves(108)),
    12: _layout(144, (Part(16, 128, 4, 32),), (Part(4, 12, 8),), *_halves(0, 2)),
    13: _layout(
        176, (Part(48, 128, 4, 32), Part(16, 32, 1, 32)), (Part(4, 12, 8),), *_halves(0, 2)
    ),
    14: _layout(
        210, (Part(0, 128, 4, 64), Part(128, 64, 2, 32)), (Part(192, 16, 8),), *_halves(208)
    ),
    20: _NIBBLES,
    23: _layout(136, (Part(8, 128, 4, 16),), (Part(2, 6, 8),), *_halves(0)),
    39: _layout(17, (Part(1, 16, 4, 16),), (Part(0, 1, 8),)),
}
"""Where the symbols of a block are, by type; others are looked at as what they are: bytes."""


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """One tensor of a GGUF file.

    Attributes:
        name: As in the file.
        kind: Number of its type.
        dtype: Safetensors code of what `endor` sees.
        shape: In elements of that; blocks by their bytes.
        start: First byte, from the file's start.
    """

    name: str
    kind: int
    dtype: str
    shape: tuple[int, ...]
    start: int

    @property
    def nbytes(self) -> int:
        return DTYPES[self.dtype].nbytes(int(np.prod(self.shape, dtype=object)))


class _Cursor:
    """Reads little-endian values of a head, and never past it."""

    def __init__(self, raw: bytes) -> None:
        self.raw, self.at = raw, 0

    def take(self, form: str) -> int:
        size = struct.calcsize(form)
        if self.at + size > len(self.raw):
            raise ValueError("the head ends too early")
        (value,) = struct.unpack_from("<" + form, self.raw, self.at)
        self.at += size
        return int(value)

    def skip(self, count: int) -> None:
        if count > len(self.raw) - self.at:
            raise ValueError("the head ends too early")
        self.at += count

    def text(self) -> str:
        size = self.take("Q")
        begin = self.at
        self.skip(size)
        return self.raw[begin : begin + size].decode()


_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_TEXT, _ARRAY, _UINT32 = 8, 9, 4


def _skip_value(cursor: _Cursor, kind: int) -> None:
    if kind in _SIZES:
        cursor.skip(_SIZES[kind])
    elif kind == _TEXT:
        cursor.skip(cursor.take("Q"))
    elif kind == _ARRAY:
        inner, count = cursor.take("I"), cursor.take("Q")
        if inner in _SIZES:
            cursor.skip(_SIZES[inner] * count)
        elif inner == _TEXT:
            for _ in range(count):
                cursor.skip(cursor.take("Q"))
        else:
            raise ValueError(f"an array of values of type {inner} is not known")
    else:
        raise ValueError(f"a value of type {kind} is not known")


def places_of(raw: bytes, tensors: Mapping[str, SourceTensor]) -> dict[str, int]:
    """Return where each of `tensors`, head and tail among them, begins in the file.

    Raises:
        FormatError: `raw`, the head, does not describe these tensors.
    """
    try:
        found, start = parse_head(raw)
    except (ValueError, struct.error) as error:
        raise FormatError(f"{HEAD}: is no head of a GGUF file: {error}") from None
    wanted = {each.name: (each.dtype, each.shape) for each in found}
    have = {name: (tensor.dtype.name, tensor.shape) for name, tensor in tensors.items()}
    if wanted != {name: held for name, held in have.items() if name not in (HEAD, TAIL)}:
        raise FormatError(f"{HEAD}: describes other tensors than are here; make the packing again")
    end = found[-1].start + found[-1].nbytes if found else start
    return {HEAD: 0, TAIL: end} | {each.name: each.start for each in found}


def parse_head(raw: bytes) -> tuple[list[GgufTensor], int]:
    """Return the tensors of a GGUF file in their order, and where their data begin.

    Args:
        raw: The file's first bytes, the whole head among them.

    Raises:
        ValueError: They are no head of a version that is known, or are cut off.
    """
    cursor = _Cursor(raw)
    if raw[:4] != MAGIC:
        raise ValueError("the file must begin with GGUF")
    cursor.skip(4)
    version = cursor.take("I")
    if version not in (2, 3):
        raise ValueError(f"version must be 2 or 3, little-endian, got {version}")
    n_tensors, n_values, align = cursor.take("Q"), cursor.take("Q"), 32
    for _ in range(n_values):
        key, kind = cursor.text(), cursor.take("I")
        if key == "general.alignment" and kind == _UINT32:
            align = cursor.take("I")
        else:
            _skip_value(cursor, kind)
    if align < 1 or align & align - 1:
        raise ValueError(f"alignment must be a power of two, got {align}")
    infos = []
    for _ in range(n_tensors):
        name, dims = cursor.text(), cursor.take("I")
        if dims > 4:
            raise ValueError(f"{name}: must have at most 4 dimensions, got {dims}")
        sizes = [cursor.take("Q") for _ in range(dims)]
        infos.append((name, sizes, cursor.take("I"), cursor.take("Q")))
    start = -(-cursor.at // align) * align
    tensors, seen, end = [], {HEAD, TAIL}, start
    for name, sizes, kind, offset in infos:
        if name in seen or not name:
            raise ValueError(f"{name!r}: must name one tensor")
        seen.add(name)
        dtype, shape = _stored(name, sizes, kind)
        tensor = GgufTensor(name, kind, dtype, shape, start + offset)
        if tensor.start < end or offset % align:
            raise ValueError(f"{name}: must follow the tensor before it, aligned to {align} bytes")
        end = tensor.start + tensor.nbytes
        tensors.append(tensor)
    return tensors, start


def _stored(name: str, sizes: list[int], kind: int) -> tuple[str, tuple[int, ...]]:
    if max(sizes, default=0) >= 1 << 40 or np.prod([1, *sizes], dtype=object) > 1 << 40:
        raise ValueError(f"{name}: has more than 2^40 elements")
    shape = tuple(reversed(sizes))
    if kind in PLAIN:
        return PLAIN[kind], shape
    if kind not in BLOCKS:
        raise ValueError(f"{name}: has type {kind}, which is not known")
    elements, nbytes = BLOCKS[kind]
    if not shape or shape[-1] % elements:
        raise ValueError(f"{name}: rows must be whole blocks of {elements} elements")
    rows = shape[:-1] if len(shape) > 1 else (1,)
    return "U8", (*rows, shape[-1] // elements * nbytes)


class GgufSource:
    """The tensors of one GGUF file; see `symbol_layouts` for what is in their blocks."""

    ordered = False

    def __init__(self, path: Path) -> None:
        self.path = path
        self.directory: Path | None = None
        size = path.stat().st_size
        with path.open("rb") as file:
            raw = file.read(min(size, MAX_HEAD_BYTES))
        try:
            found, start = parse_head(raw)
            self._check_places(raw, found, start, size)
        except (ValueError, struct.error) as error:
            raise CheckpointError(
                f"{path}: is a damaged or unknown GGUF file: {error}; fetch it again"
            ) from None
        self._files = OpenFiles()
        self._kinds = {tensor.name: tensor.kind for tensor in found}
        self._starts = {HEAD: 0, **{tensor.name: tensor.start for tensor in found}}
        end = found[-1].start + found[-1].nbytes if found else start
        u8 = DTYPES["U8"]
        self.tensors = {HEAD: SourceTensor(HEAD, u8, (min(start, size),), path.name)}
        for tensor in found:
            kind = DTYPES[tensor.dtype]
            self.tensors[tensor.name] = SourceTensor(tensor.name, kind, tensor.shape, path.name)
        if size > end:
            self._starts[TAIL] = end
            self.tensors[TAIL] = SourceTensor(TAIL, u8, (size - end,), path.name)

    def _check_places(self, raw: bytes, found: list[GgufTensor], start: int, size: int) -> None:
        """Raise unless all data are there and what lies between tensors is 0."""
        if start > size and found:
            raise ValueError("it ends before its tensors")
        at = start
        with self.path.open("rb") as file:
            for tensor in found:
                if tensor.start + tensor.nbytes > size:
                    raise ValueError(f"{tensor.name}: lies past the file's end")
                file.seek(at)
                if tensor.start - at > 1 << 20 or any(file.read(tensor.start - at)):
                    raise ValueError(f"{tensor.name}: what lies before it must be padding of zeros")
                at = tensor.start + tensor.nbytes

    def symbol_layouts(self, name: str) -> tuple[Layout, ...]:
        """Return where the symbols of a tensor are; none for floats and unknown blocks."""
        layout = LAYOUTS.get(self._kinds.get(name, -1))
        return () if layout is None else (layout,)

    def read_into(self, name: str, out: np.ndarray) -> None:
        self._files.read_into(self.path, self._starts[name], out)

    def config(self) -> dict[str, Any] | None:
        return None

    def fingerprint(self) -> str:
        return fingerprint_files([self.path])

    def close(self) -> None:
        self._files.close()
