"""What a weight of another quantised format is, whatever its parts are called."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from endor.codecs import DTYPES, DType
from endor.codecs.codes import Codes
from endor.errors import CheckpointError

Read = Callable[[str], np.ndarray]
"""A stored tensor by name, as an array of its shape: floats as float32, integers as they are,
8-bit floats and other bytes as uint8."""

MINIFLOATS = {"F8_E4M3": (4, 3, 7), "F8_E5M2": (5, 2, 15)}
"""Exponent bits, mantissa bits and bias of the 8-bit floats."""

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=np.float32)
E2M1 = np.concatenate([E2M1, -E2M1])
"""Values of the 4-bit floats by their code."""


class StoredTensor(Protocol):
    """A tensor of a checkpoint, by its header."""

    @property
    def name(self) -> str: ...

    @property
    def dtype(self) -> DType: ...

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def numel(self) -> int: ...


@dataclass(frozen=True, slots=True)
class QuantizedWeight:
    """A weight that is stored as codes and scales.

    Attributes:
        name: Of the dense weight.
        shape: Its shape.
        parts: Stored tensors that make it up; they are no tensors of the dense checkpoint.
        dtype: Of the dense weight.
        codes: Reads the parts. Blocks of one element say that steps do not lie in blocks.
    """

    name: str
    shape: tuple[int, ...]
    parts: tuple[str, ...]
    dtype: DType
    codes: Callable[[Read], Codes]


@dataclass(frozen=True, slots=True)
class Stored:
    """A quantised checkpoint as its formats see it.

    Attributes:
        where: For messages.
        tensors: By name.
        section: The `quantization_config` of config.json.
        dtype: Of the dense weights.
        read: Reads one.
    """

    where: str
    tensors: Mapping[str, StoredTensor]
    section: Mapping[str, Any]
    dtype: DType
    read: Read

    def wrong(self, name: str, rule: str) -> CheckpointError:
        """Return the error for a part that is not what its format promises."""
        tensor = self.tensors[name]
        return CheckpointError(
            f"{self.where}: {name}: {rule}, is {tensor.dtype.name} {list(tensor.shape)}; download "
            "the checkpoint again, or pack it without --dequantize"
        )

    def bits(self, default: int) -> int:
        """Return the bits of a code by config.json."""
        for key in ("bits", "w_bit", "num_bits"):
            if isinstance(self.section.get(key), int):
                return int(self.section[key])
        groups = self.section.get("config_groups")
        for group in groups.values() if isinstance(groups, Mapping) else ():
            weights = group.get("weights") if isinstance(group, Mapping) else None
            if isinstance(weights, Mapping) and isinstance(weights.get("num_bits"), int):
                return int(weights["num_bits"])
        return default


def minifloat_levels(name: str) -> np.ndarray:
    """Return the float32 value of every code of an 8-bit float; NaN and infinities as NaN."""
    exponent_bits, mantissa_bits, bias = MINIFLOATS[name]
    code = np.arange(256)
    exponent = code >> mantissa_bits & ((1 << exponent_bits) - 1)
    mantissa = code & ((1 << mantissa_bits) - 1)
    whole = np.where(exponent > 0, mantissa + (1 << mantissa_bits), mantissa)
    values = np.ldexp(whole.astype(np.float64), np.maximum(exponent, 1) - bias - mantissa_bits)
    if name == "F8_E4M3":
        values[(code & 0x7F) == 0x7F] = np.nan
    else:
        values[exponent == (1 << exponent_bits) - 1] = np.nan
    found: np.ndarray = np.where(code >= 128, -values, values).astype(np.float32)
    return found


def unpack_symbols(words: np.ndarray, bits: int, count: int) -> np.ndarray:
    """Return `count` codes of `bits` bits from each row of words, u8: lowest bits first.

    Args:
        words: `(rows, words of a row)` of any integer type.
        bits: 1 to 8; codes may straddle words.
        count: Codes of a row.
    """
    rows = len(words)
    raw = np.ascontiguousarray(words).view(np.uint8).reshape(rows, -1)
    if bits == 8:
        return raw[:, :count]
    if 8 % bits == 0:
        shifts = np.arange(0, 8, bits, dtype=np.uint8)
        out = raw[:, :, None] >> shifts & np.uint8((1 << bits) - 1)
        return out.reshape(rows, -1)[:, :count]
    single = np.unpackbits(raw, axis=1, bitorder="little")[:, : count * bits]
    weights = (1 << np.arange(bits)).astype(np.uint8)
    found: np.ndarray = (single.reshape(rows, count, bits) * weights).sum(axis=2, dtype=np.uint8)
    return found


def scales_of(stored: Stored, name: str) -> np.ndarray:
    """Return scales as float32: floats as they are, bytes as powers of two (E8M0)."""
    values, kind = stored.read(name), stored.tensors[name].dtype.name
    if kind in ("U8", "F8_E8M0"):
        return np.ldexp(np.float32(1), values.astype(np.int32) - 127).astype(np.float32)
    if kind in MINIFLOATS:
        return minifloat_levels(kind)[values]
    if values.dtype != np.float32:
        raise stored.wrong(name, "scales must be floats")
    return values


def matrix(shape: tuple[int, ...]) -> tuple[int, int]:
    """Return rows and columns, leading dimensions together."""
    return math.prod(shape[:-1]), shape[-1]


def dense_dtype(config: Mapping[str, Any], tensors: Mapping[str, StoredTensor]) -> DType:
    """Return the element type of the dense model: config.json's, or that of most small tensors."""
    names = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
    for key in ("dtype", "torch_dtype"):
        found = config.get(key)
        if isinstance(found, str) and found.removeprefix("torch.") in names:
            return DTYPES[names[found.removeprefix("torch.")]]
    kinds = [
        tensor.dtype.name for tensor in tensors.values() if tensor.dtype.name in ("BF16", "F16")
    ]
    return DTYPES[max(set(kinds), key=kinds.count) if kinds else "BF16"]
