"""Codec `exp`: sign and mantissa as they are, the exponent as `k` bits above a base.

Trained weights use few exponents, and pruning leaves fewer: a window of 4 or 8 neighbouring ones
covers nearly all. An element outside the window (an outlier, a subnormal, NaN, Inf) is patched: its
code is 0 and its exponent stands in a side list by rank, so every bit pattern survives.

Exponent coding of weights without a bitmap is known from DFloat11 (arXiv 2504.11651) and ZipNN
(arXiv 2411.05239), which use variable-length codes; the fixed width keeps every lane independent.
"""

from collections.abc import Mapping

import numpy as np

from endor.codecs.bitmap import bitmap_from_mask, mask_from_bitmap, tile_offsets
from endor.codecs.dtypes import DType
from endor.codecs.spec import GROUP, TILE, Encoded, TensorSpec


def encode(bits: np.ndarray, dtype: DType, *, bitmap: bool, k: int, base: int) -> Encoded:
    """Return `bits` with the exponent window `[base, base + 2**k)`.

    Args:
        bits: Elements as unsigned integers, any shape.
        dtype: Their element type.
        bitmap: Store only the elements with a bit set.
        k: Bits of the exponent code.
        base: First exponent of the window.
    """
    flat = bits.reshape(-1)
    arrays: dict[str, np.ndarray] = {}
    stored = flat
    if bitmap:
        mask = flat != 0
        stored = flat[mask]
        arrays["bitmap"] = bitmap_from_mask(mask)
        arrays = {"tile_offsets": tile_offsets(arrays["bitmap"]), **arrays}
    exponents = dtype.exponents(stored).astype(np.int64)
    codes = exponents - base
    if not dtype.signed:
        codes &= (1 << dtype.exponent_bits) - 1
    outside = (codes < 0) | (codes >= 1 << k)
    codes[outside] = 0
    ranks = np.flatnonzero(outside)
    spec = TensorSpec(bits.shape, dtype, "exp", bitmap, stored.size, k, base, ranks.size)

    words = (codes.astype(np.uint64) << np.uint64(dtype.rest_bits)) | dtype.rests(stored)
    if spec.byte_planes:
        arrays["bytes"] = np.stack(
            [(words >> np.uint64(8 * j)).astype(np.uint8) for j in range(spec.byte_planes)]
        )
    planes = np.zeros((spec.bit_planes, spec.plane_nbytes), dtype=np.uint8)
    for j in range(spec.bit_planes):
        bit = (words >> np.uint64(8 * spec.byte_planes + j)) & np.uint64(1)
        packed = np.packbits(bit.astype(np.uint8), bitorder="little")
        planes[j, : packed.size] = packed
    arrays["planes"] = planes
    if ranks.size:
        starts = group_starts(spec, arrays)
        groups = np.searchsorted(starts, ranks, side="right") - 1
        # Empty groups share their start with the next one; the last of equals is the right one.
        counts = np.bincount(groups, minlength=spec.n_groups)
        arrays["patch_offsets"] = np.concatenate([[0], np.cumsum(counts)]).astype(np.uint32)
        arrays["patch_ranks"] = (ranks - starts[groups]).astype(np.uint16)
        arrays["patch_exponents"] = exponents[ranks].astype(np.uint8)
    return Encoded(spec, arrays)


def decode(encoded: Encoded) -> np.ndarray:
    """Return the flat elements, with zero bits where none was stored."""
    spec, arrays = encoded.spec, encoded.arrays
    words = np.zeros(spec.nnz, dtype=np.uint64)
    for j in range(spec.byte_planes):
        words |= arrays["bytes"][j].astype(np.uint64) << np.uint64(8 * j)
    for j in range(spec.bit_planes):
        bit = np.unpackbits(arrays["planes"][j], count=spec.nnz, bitorder="little")
        words |= bit.astype(np.uint64) << np.uint64(8 * spec.byte_planes + j)
    rest_bits = spec.dtype.rest_bits
    exponents = (words >> np.uint64(rest_bits)) + np.uint64(spec.base)
    exponents &= np.uint64((1 << spec.dtype.exponent_bits) - 1)
    if spec.patches:
        counts: np.ndarray = np.diff(arrays["patch_offsets"].astype(np.int64))
        first = np.repeat(group_starts(spec, arrays), counts)
        exponents[first + arrays["patch_ranks"]] = arrays["patch_exponents"]
    stored = spec.dtype.join(exponents, words & np.uint64((1 << rest_bits) - 1))
    if not spec.bitmap:
        return stored
    out = np.zeros(spec.numel, dtype=spec.dtype.uint)
    out[mask_from_bitmap(arrays["bitmap"], spec.numel)] = stored
    return out


def group_starts(spec: TensorSpec, arrays: Mapping[str, np.ndarray]) -> np.ndarray:
    """Return the rank of the first stored element of each patch group, int64 `(n_groups,)`."""
    if not spec.bitmap:
        return np.arange(spec.n_groups, dtype=np.int64) * GROUP
    offsets = arrays["tile_offsets"]
    return offsets[: -1 : GROUP // TILE].astype(np.int64)
