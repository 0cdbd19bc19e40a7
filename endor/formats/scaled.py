"""Codes in a tensor of the weight's own name and shape, scales beside it.

8-bit floats in blocks (DeepSeek, transformers' fp8), by row or tensor (FBGEMM, compressed-tensors
`float-quantized` and `naive-quantized`), int8 by row (compressed-tensors `int-quantized`,
bitsandbytes).
"""

from collections.abc import Iterator

import numpy as np

from endor.codecs.codes import Codes
from endor.formats.contract import (
    MINIFLOATS,
    QuantizedWeight,
    Read,
    Stored,
    StoredTensor,
    matrix,
    minifloat_levels,
    scales_of,
)

SUFFIXES = ("_scale_inv", "_scale", ".SCB")
"""What scales are called, behind the weight's name."""

_ACTIVATIONS = ("input_scale", "activation_scale", "input_zero_point", "output_scale")
_EIGHT_BITS = np.float32(1 / 127)


def scaled_weights(stored: Stored) -> Iterator[QuantizedWeight]:
    """Yield the weights stored so."""
    for name, tensor in stored.tensors.items():
        if tensor.dtype.name not in (*MINIFLOATS, "I8") or len(tensor.shape) < 2:
            continue
        scale = _scale_name(stored, name)
        if scale is not None:
            yield _weight(stored, tensor, scale)


def _scale_name(stored: Stored, name: str) -> str | None:
    parent = name.rpartition(".")[0]
    candidates = [name + suffix for suffix in SUFFIXES] + [f"{parent}.SCB", f"{parent}.scale"]
    return next((found for found in candidates if found in stored.tensors), None)


def _weight(stored: Stored, tensor: StoredTensor, scale: str) -> QuantizedWeight:
    name, parent = tensor.name, tensor.name.rpartition(".")[0]
    zeros = f"{name}_zero_point"
    parts = [name, scale]
    parts += [part for part in (zeros, f"{parent}.weight_format") if part in stored.tensors]
    parts += [f"{parent}.{part}" for part in _ACTIVATIONS if f"{parent}.{part}" in stored.tensors]
    block = _block(stored, tensor, scale)
    if zeros in stored.tensors and stored.tensors[zeros].numel != stored.tensors[scale].numel:
        raise stored.wrong(zeros, f"must have as many elements as {scale}")

    def codes(read: Read) -> Codes:
        steps = scales_of(stored, scale)
        if scale.endswith(".SCB"):
            steps = steps * _EIGHT_BITS
        rows, cols = matrix(tensor.shape)
        grid = -(-rows // block[0]), -(-cols // block[1])
        steps = steps.reshape(grid)
        found = read(name)
        if tensor.dtype.name in MINIFLOATS:
            return _of_levels(stored, tensor, found, steps, block)
        whole = found.astype(np.int32)
        if zeros in stored.tensors:
            shift = read(zeros).astype(np.int32).reshape(grid)
            shift = np.repeat(np.repeat(shift, block[0], axis=0)[:rows], block[1], axis=1)[:, :cols]
            whole -= shift.reshape(tensor.shape)
        return Codes(whole, steps, block=block)

    return QuantizedWeight(name, tensor.shape, tuple(parts), stored.dtype, codes)


def _of_levels(
    stored: Stored,
    tensor: StoredTensor,
    found: np.ndarray,
    steps: np.ndarray,
    block: tuple[int, int],
) -> Codes:
    levels = minifloat_levels(tensor.dtype.name)
    wrong = np.isnan(levels)
    if wrong[found].any():
        raise stored.wrong(tensor.name, "holds NaN or infinity")
    return Codes(found, steps, np.where(wrong, np.float32(0), levels), block)


def _block(stored: Stored, tensor: StoredTensor, scale: str) -> tuple[int, int]:
    """Return the rows and columns that share a scale."""
    rows, cols = matrix(tensor.shape)
    shape = stored.tensors[scale].shape
    count = stored.tensors[scale].numel
    if count == 1:
        return rows, cols
    grid = shape if len(shape) > 1 else (*shape, 1)
    wanted = stored.section.get("weight_block_size")
    sizes = wanted if isinstance(wanted, list) and len(wanted) == 2 else (0, 0)
    *lead, down, across = grid
    each = tensor.shape[-2]
    experts = rows // max(each, 1)
    if len(tensor.shape) > 2 and len(grid) < len(tensor.shape):  # one scale an expert
        lead, down, across = [count], 1, 1
    if int(np.prod(lead, dtype=np.int64)) not in (1, experts) or (
        len(tensor.shape) > 2 and int(np.prod(lead, dtype=np.int64)) != experts
    ):
        raise stored.wrong(scale, f"must have scales for {experts} matrices of {tensor.name}")
    block = _side(each, down, sizes[0]), _side(cols, across, sizes[1])
    if None in block or (experts > 1 and each % (block[0] or 1)):
        raise stored.wrong(scale, f"must be scales for blocks of {list(tensor.shape)}")
    return block[0] or 1, block[1] or 1


def _side(size: int, count: int, wanted: int) -> int | None:
    """Return how many of `size` rows share one of `count` scales; None where that is none."""
    if wanted and isinstance(wanted, int) and -(-size // wanted) == count:
        return wanted
    return size // count if count and size % count == 0 else None
