"""Integer codes in words of 32 bits: GPTQ, AWQ, and compressed-tensors `pack-quantized`."""

from collections.abc import Iterator

import numpy as np

from endor.codecs.codes import Codes
from endor.formats.contract import (
    QuantizedWeight,
    Read,
    Stored,
    scales_of,
    unpack_symbols,
)

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Column, of eight, whose code is at each place of a word."""


def word_weights(stored: Stored) -> Iterator[QuantizedWeight]:
    """Yield the weights stored so."""
    for name in stored.tensors:
        parent = name.rpartition(".")[0]
        if name.endswith(".qweight"):
            yield _turned(stored, parent)
        elif name.endswith("weight_packed") and stored.tensors[name].dtype.name == "I32":
            yield _packed(stored, parent)


def _turned(stored: Stored, parent: str) -> QuantizedWeight:
    """GPTQ and AWQ: input by output, zero points packed like the codes."""
    awq = stored.section.get("quant_method") == "awq"
    bits = stored.bits(4)
    names = {part: f"{parent}.{part}" for part in ("qweight", "qzeros", "scales", "g_idx")}
    for part in ("qweight", "qzeros", "scales"):
        if names[part] not in stored.tensors:
            raise stored.wrong(names["qweight"], f"{names[part]} must be beside it")
    words, scales = stored.tensors[names["qweight"]], stored.tensors[names["scales"]]
    if len(words.shape) != 2 or words.dtype.name != "I32" or len(scales.shape) != 2:
        raise stored.wrong(words.name, "must be a matrix of int32 with a matrix of scales")
    if not 1 <= bits <= 8 or (awq and bits != 4):
        raise stored.wrong(words.name, f"codes of {bits} bits are not known of this format")
    groups, rows = scales.shape
    cols = words.shape[0] if awq else words.shape[0] * 32 // bits
    found = (words.shape[1] * 32 // bits if awq else words.shape[1], scales.shape[1])
    if found[0] != rows:
        raise stored.wrong(words.name, f"must have codes for {rows} outputs")
    group = -(-cols // max(groups, 1))
    wanted = stored.section.get("group_size", stored.section.get("q_group_size"))
    if isinstance(wanted, int) and wanted > 0 and -(-cols // wanted) == groups:
        group = wanted
    zeros = stored.tensors[names["qzeros"]]
    if zeros.dtype.name != "I32" or zeros.shape[:1] != (groups,):
        raise stored.wrong(zeros.name, f"must be int32, in {groups} rows")

    def whole(read: Read) -> tuple[np.ndarray, np.ndarray]:
        """Codes `(out, in)` and zero points `(out, groups)`."""
        if awq:
            each = [_awq(read(names[part])) for part in ("qweight", "qzeros")]
            return each[0].T.astype(np.int32), each[1].T.astype(np.int32)
        codes = unpack_symbols(np.ascontiguousarray(read(names["qweight"]).T), bits, cols)
        points = unpack_symbols(read(names["qzeros"]), bits, rows).astype(np.int32)
        if stored.section.get("checkpoint_format") != "gptq_v2":  # stored as one less
            points = points + 1 & (1 << bits) - 1
        return codes.astype(np.int32), points.T

    def order(read: Read) -> np.ndarray:
        if names["g_idx"] not in stored.tensors:
            return np.arange(cols) // group
        found: np.ndarray = read(names["g_idx"]).astype(np.int64)
        if found.shape != (cols,) or found.min() < 0 or found.max() >= groups:
            raise stored.wrong(names["g_idx"], f"must name one of {groups} groups for each input")
        return found

    def codes(read: Read) -> Codes:
        index = order(read)
        values, points = whole(read)
        steps = scales_of(stored, names["scales"]).T
        values -= points[:, index]
        if not np.array_equal(index, np.arange(cols) // group):
            return Codes(values, steps[:, index], block=(1, 1))
        return Codes(values, np.ascontiguousarray(steps), block=(1, group))

    parts = tuple(name for name in names.values() if name in stored.tensors)
    return QuantizedWeight(f"{parent}.weight", (rows, cols), parts, stored.dtype, codes)


def _awq(words: np.ndarray) -> np.ndarray:
    nibbles = unpack_symbols(words, 4, words.shape[1] * 8).reshape(len(words), -1, 8)
    out = np.empty_like(nibbles)
    out[:, :, list(AWQ_ORDER)] = nibbles
    return out.reshape(len(words), -1)


def _packed(stored: Stored, parent: str) -> QuantizedWeight:
    """compressed-tensors: output by input, codes stored from 0 on."""
    names = {
        part: f"{parent}.weight_{part}"
        for part in ("packed", "scale", "shape", "zero_point", "g_idx")
    }
    for part in ("scale", "shape"):
        if names[part] not in stored.tensors:
            raise stored.wrong(names["packed"], f"{names[part]} must be beside it")
    bits = stored.bits(4)
    words = stored.tensors[names["packed"]]
    shape = tuple(int(size) for size in stored.read(names["shape"]).reshape(-1))
    if len(shape) != 2 or len(words.shape) != 2 or not 1 <= bits <= 8 or min(shape) < 1:
        raise stored.wrong(words.name, f"must be a matrix of codes of {bits} bits for {shape}")
    rows, cols = shape
    per = 32 // bits
    if words.shape != (rows, -(-cols // per)) or 32 % bits:
        raise stored.wrong(words.name, f"must have {rows} rows of {-(-cols // per)} words")
    scales = stored.tensors[names["scale"]]
    grid = scales.shape if len(scales.shape) == 2 else (scales.numel, 1)
    if grid[0] not in (1, rows) or not grid[1]:
        raise stored.wrong(names["scale"], f"must have scales for {rows} rows")
    block = rows // grid[0], -(-cols // grid[1])
    half = 1 << (bits - 1)

    def codes(read: Read) -> Codes:
        values = unpack_symbols(read(names["packed"]), bits, cols).astype(np.int32) - half
        steps = scales_of(stored, names["scale"]).reshape(grid)
        index = np.arange(cols) // block[1]
        if names["g_idx"] in stored.tensors:
            index = read(names["g_idx"]).astype(np.int64)
            if index.shape != (cols,) or index.min() < 0 or index.max() >= grid[1]:
                raise stored.wrong(names["g_idx"], f"must name one of {grid[1]} groups")
        if names["zero_point"] in stored.tensors:
            points = read(names["zero_point"])
            if stored.tensors[names["zero_point"]].dtype.name == "I32":
                points = unpack_symbols(np.ascontiguousarray(points.T), bits, grid[0]).T
                points = points.astype(np.int32) - half
            values -= points.astype(np.int32).reshape(grid)[:, index]
        if not np.array_equal(index, np.arange(cols) // block[1]):
            return Codes(values, np.broadcast_to(steps, grid)[:, index], block=(block[0], 1))
        return Codes(values, steps, block=block)

    parts = tuple(name for name in names.values() if name in stored.tensors)
    parts += tuple(
        name
        for part in ("input_scale", "input_zero_point")
        if (name := f"{parent}.{part}") in stored.tensors
    )
    return QuantizedWeight(f"{parent}.weight", (rows, cols), parts, stored.dtype, codes)
