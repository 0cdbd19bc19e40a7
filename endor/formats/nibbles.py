"""4-bit codes in bytes: mxfp4 of gpt-oss, NF4 and FP4 of bitsandbytes."""

import json
import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from endor.codecs import DTYPES
from endor.codecs.codes import Codes
from endor.formats.contract import (
    E2M1,
    QuantizedWeight,
    Read,
    Stored,
    scales_of,
    unpack_symbols,
)

_STATE = ".quant_state.bitsandbytes__"
_NAMES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}


def nibble_weights(stored: Stored) -> Iterator[QuantizedWeight]:
    """Yield the weights stored so."""
    for name in stored.tensors:
        if name.endswith("_blocks") and f"{name[:-7]}_scales" in stored.tensors:
            yield _blocks(stored, name[:-7])
        elif _STATE in name:
            yield _bitsandbytes(stored, name.partition(_STATE)[0], name)


def _blocks(stored: Stored, name: str) -> QuantizedWeight:
    """mxfp4: 32 codes along the inputs share a power of two; the dense stack is input by output."""
    blocks, scales = stored.tensors[f"{name}_blocks"], stored.tensors[f"{name}_scales"]
    if blocks.dtype.name != "U8" or blocks.shape != (*scales.shape, 16) or len(scales.shape) != 3:
        raise stored.wrong(blocks.name, f"must be bytes in blocks of 16 for {scales.name}")
    experts, rows, groups = scales.shape
    cols = 32 * groups

    def codes(read: Read) -> Codes:
        nibbles = unpack_symbols(read(blocks.name).reshape(experts * rows * groups, 16), 4, 32)
        turned = nibbles.reshape(experts, rows, cols).transpose(0, 2, 1)
        steps = scales_of(stored, scales.name).transpose(0, 2, 1)
        steps = np.ascontiguousarray(steps).reshape(experts * groups, rows)
        return Codes(np.ascontiguousarray(turned), steps, E2M1, (32, 1))

    return QuantizedWeight(
        name,
        (experts, cols, rows),
        (blocks.name, scales.name),
        stored.dtype,
        codes,
    )


def _bitsandbytes(stored: Stored, name: str, state_name: str) -> QuantizedWeight:
    """NF4 and FP4: a table of values, a largest magnitude a block, itself quantised maybe."""
    state = _state(stored, state_name)
    try:
        shape = tuple(int(size) for size in state["shape"])
        size = int(state["blocksize"])
        dtype = DTYPES[_NAMES[str(state.get("dtype", "bfloat16"))]]
    except (KeyError, TypeError, ValueError):
        raise stored.wrong(state_name, "must say shape, block size and type") from None
    numel = math.prod(shape)
    parts = {
        part: f"{name}.{part}"
        for part in ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
        if f"{name}.{part}" in stored.tensors
    }
    nested = "nested_absmax" in parts
    if name not in stored.tensors or not {"absmax", "quant_map"} <= parts.keys() or size < 1:
        raise stored.wrong(state_name, "its codes, absmax and quant_map must be beside it")
    if stored.tensors[name].numel != -(-numel // 2) or len(shape) != 2:
        raise stored.wrong(name, f"must hold 4-bit codes of a matrix {list(shape)}")
    if stored.tensors[parts["absmax"]].numel != -(-numel // size):
        raise stored.wrong(parts["absmax"], f"must have one for {size} weights")

    def codes(read: Read) -> Codes:
        raw = read(name).reshape(-1)
        found = np.stack([raw >> 4, raw & 15], axis=1).reshape(-1)[:numel].reshape(shape)
        absmax = read(parts["absmax"]).reshape(-1)
        if nested:
            table = read(parts["nested_quant_map"]).astype(np.float32)
            each = int(state["nested_blocksize"])
            outer = np.repeat(read(parts["nested_absmax"]).reshape(-1), each)[: absmax.size]
            absmax = table[absmax] * outer + np.float32(state["nested_offset"])
        steps = absmax.astype(np.float32)
        levels = read(parts["quant_map"]).astype(np.float32)
        if shape[1] % size == 0:
            grid = steps.reshape(shape[0], shape[1] // size)
            return Codes(found, grid, levels, (1, size))
        spread = np.repeat(steps, size)[:numel].reshape(shape)
        return Codes(found, spread, levels, (1, 1))

    return QuantizedWeight(
        name,
        shape,
        (name, state_name, *parts.values()),
        dtype,
        codes,
    )


def _state(stored: Stored, name: str) -> dict[str, Any]:
    try:
        found = json.loads(stored.read(name).astype(np.uint8).tobytes())
    except (UnicodeDecodeError, json.JSONDecodeError):
        found = None
    if not isinstance(found, dict):
        raise stored.wrong(name, "must be a JSON object")
    return found
