"""Bitmaps: which elements are stored, one bit each, in tiles with their own offsets."""

import numpy as np

from endor.codecs.spec import BITMAP_TILE_BYTES, TILE


def bitmap_from_mask(mask: np.ndarray) -> np.ndarray:
    """Return the bitmap of a flat bool array, LSB first, padded with zero bits to whole tiles."""
    n_tiles = -(-mask.size // TILE)
    bitmap = np.zeros(n_tiles * BITMAP_TILE_BYTES, dtype=np.uint8)
    packed = np.packbits(mask, bitorder="little")
    bitmap[: packed.size] = packed
    return bitmap


def mask_from_bitmap(bitmap: np.ndarray, numel: int) -> np.ndarray:
    """Return the flat bool array of `numel` elements that `bitmap` describes."""
    return np.unpackbits(bitmap, count=numel, bitorder="little").view(np.bool_)


def tile_offsets(bitmap: np.ndarray) -> np.ndarray:
    """Return the stored elements before each tile and in total, u32 `(n_tiles + 1,)`."""
    counts = np.bitwise_count(bitmap.reshape(-1, BITMAP_TILE_BYTES)).sum(axis=1, dtype=np.uint64)
    offsets = np.zeros(counts.size + 1, dtype=np.uint64)
    np.cumsum(counts, out=offsets[1:])
    return offsets.astype(np.uint32)
