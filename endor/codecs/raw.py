"""Codec `raw`: a bitmap, and the stored elements as they are (Endor, arXiv 2406.11674)."""

import numpy as np

from endor.codecs.bitmap import bitmap_from_mask, mask_from_bitmap, tile_offsets
from endor.codecs.dtypes import DType
from endor.codecs.spec import Encoded, TensorSpec


def encode(bits: np.ndarray, dtype: DType) -> Encoded:
    """Return the elements of `bits` that have any bit set, and the bitmap of where they stood."""
    flat = bits.reshape(-1)
    mask = flat != 0
    bitmap = bitmap_from_mask(mask)
    values = flat[mask]
    spec = TensorSpec(bits.shape, dtype, "raw", bitmap=True, nnz=values.size)
    arrays = {"tile_offsets": tile_offsets(bitmap), "bitmap": bitmap, "values": values}
    return Encoded(spec, arrays)


def decode(encoded: Encoded) -> np.ndarray:
    """Return the flat elements, with zero bits where none was stored."""
    spec = encoded.spec
    out = np.zeros(spec.numel, dtype=spec.dtype.uint)
    out[mask_from_bitmap(encoded.arrays["bitmap"], spec.numel)] = encoded.arrays["values"]
    return out
