"""Structural checks of stored arrays, so that no kernel ever runs on a hostile file."""

import numpy as np

from endor.codecs import bundled, fields, integer
from endor.codecs.bitmap import tile_offsets
from endor.codecs.exp import group_starts
from endor.codecs.spec import Encoded
from endor.errors import FormatError


def validate(encoded: Encoded) -> None:
    """Raise `FormatError` unless the arrays are exactly what their spec promises.

    After this returns, decoding reads and writes inside its buffers only.
    """
    spec, arrays = encoded.spec, encoded.arrays
    spec.check()
    expected = {array.suffix: array for array in spec.arrays}
    if set(arrays) != set(expected):
        raise FormatError(f"arrays must be {sorted(expected)}, got {sorted(arrays)}")
    for suffix, array in expected.items():
        found = arrays[suffix]
        if found.shape != array.unit_shape or found.dtype != array.dtype.uint:
            raise FormatError(
                f"array {suffix!r} must be {array.dtype.name} {array.unit_shape}, "
                f"got {found.dtype} {found.shape}"
            )
        if not found.flags.c_contiguous:
            raise FormatError(f"array {suffix!r} must be C-contiguous")
    if spec.codec == "dense":
        return
    if spec.bundles is not None:
        bundled.check(encoded)
        return
    if spec.bitmap:
        _validate_bitmap(encoded)
    if spec.codec == "exp":
        _validate_planes(encoded)
        if spec.patches:
            _validate_patches(encoded)
    if spec.codec == "int":
        integer.check(encoded)
    if spec.codec == "fields":
        fields.check(encoded)


def _validate_bitmap(encoded: Encoded) -> None:
    spec, arrays = encoded.spec, encoded.arrays
    bitmap, offsets = arrays["bitmap"], arrays["tile_offsets"]
    whole, odd = divmod(spec.numel, 8)
    if bitmap[whole + 1 :].any() or (odd and int(bitmap[whole]) >> odd):
        raise FormatError(f"bitmap bits past element {spec.numel} must be 0")
    if not odd and whole < bitmap.size and bitmap[whole]:
        raise FormatError(f"bitmap bits past element {spec.numel} must be 0")
    counted = tile_offsets(bitmap)
    if int(counted[-1]) != spec.nnz:
        raise FormatError(f"bitmap must have nnz {spec.nnz} bits set, got {int(counted[-1])}")
    wrong = np.flatnonzero(counted != offsets)
    if wrong.size:
        at = int(wrong[0])
        raise FormatError(
            f"tile_offsets[{at}] must be {int(counted[at])} by the bitmap, got {int(offsets[at])}"
        )


def _validate_planes(encoded: Encoded) -> None:
    spec, planes = encoded.spec, encoded.arrays["planes"]
    odd = spec.nnz % 64
    if odd:
        last = np.ascontiguousarray(planes[:, -8:]).view("<u8").reshape(-1)
        if (last >> np.uint64(odd)).any():
            raise FormatError(f"bits of a plane past stored element {spec.nnz} must be 0")


def _validate_patches(encoded: Encoded) -> None:
    spec, arrays = encoded.spec, encoded.arrays
    offsets = arrays["patch_offsets"].astype(np.int64)
    if offsets[0] != 0 or offsets[-1] != spec.patches or (np.diff(offsets) < 0).any():
        raise FormatError(f"patch_offsets must rise from 0 to {spec.patches}")
    starts = group_starts(spec, arrays)
    sizes = np.diff(np.append(starts, spec.nnz))
    counts = np.diff(offsets)
    groups = np.repeat(np.arange(spec.n_groups), counts)
    ranks = arrays["patch_ranks"].astype(np.int64)
    if (ranks >= sizes[groups]).any():
        raise FormatError("a patch rank must lie inside its group")
    absolute = starts[groups] + ranks
    if (np.diff(absolute) <= 0).any():
        raise FormatError("patch ranks must be strictly increasing")
    if (
        spec.dtype.exponent_bits < 8
        and (arrays["patch_exponents"] >> spec.dtype.exponent_bits).any()
    ):
        raise FormatError(f"a patch exponent must be below {1 << spec.dtype.exponent_bits}")
