"""The first rows of a stored matrix: a stored matrix too, whose arrays begin those of the whole.

Tiles, patch groups and chunks follow each other in row-major order, and their offsets count from
the first one. So whoever cuts where one of them ends gets, for the rows before, arrays that need no
change: only less of each.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from endor.codecs.coding import CHUNK
from endor.codecs.spec import GROUP, TILE, Encoded, TensorSpec
from endor.errors import ShapeError

PLANES = ("bytes", "planes")
"""Arrays with a row per plane, each of which is cut."""


@dataclass(frozen=True, slots=True)
class Prefix:
    """The first rows of a stored matrix.

    Bits of a plane past its last stored element are those of the next one, where a file has zeros:
    decoders never use them.

    Attributes:
        spec: That of the rows, as a matrix of their own.
        pieces: Per array, the bytes that follow each other in it: u8 views of the whole's arrays.
    """

    spec: TensorSpec
    pieces: Mapping[str, tuple[np.ndarray, ...]]


def row_step(spec: TensorSpec) -> int:
    """Return at which multiples of rows a matrix can be cut; 0 where only whole ones can be had."""
    if len(spec.shape) != 2 or spec.codec not in ("raw", "exp", "int") or not spec.numel:
        return 0
    if spec.transposed:
        return 0
    unit = TILE
    if spec.coding is not None:
        unit = CHUNK
    elif spec.patches:
        unit = GROUP
    step = unit // math.gcd(unit, spec.shape[1])
    return step if step < spec.shape[0] else 0


def prefix(encoded: Encoded, rows: int) -> Prefix:
    """Return the first `rows` of a stored matrix, as views.

    Args:
        encoded: A valid one.
        rows: A multiple of `row_step`, or all of them.

    Raises:
        ShapeError: It cannot be cut there.
    """
    spec, arrays = encoded.spec, encoded.arrays
    step = row_step(spec)
    whole = len(spec.shape) == 2 and rows == spec.shape[0]
    if not whole and (not step or not 0 <= rows <= spec.shape[0] or rows % step):
        raise ShapeError(f"a matrix of shape {spec.shape} is cut every {step} rows, not at {rows}")
    cut = spec if whole else _cut(spec, rows, arrays)
    pieces = {}
    for array in cut.arrays:
        stored = arrays[array.suffix]
        if array.suffix in PLANES:
            count = array.shape[1]
            pieces[array.suffix] = tuple(plane[:count] for plane in stored)
        else:
            pieces[array.suffix] = (stored.reshape(-1).view(np.uint8)[: array.nbytes],)
    return Prefix(cut, pieces)


def _cut(spec: TensorSpec, rows: int, arrays: Mapping[str, np.ndarray]) -> TensorSpec:
    numel = rows * spec.shape[1]
    shape = (rows, spec.shape[1])
    if spec.coding is not None:
        chunks = numel // CHUNK
        block = spec.coding.step_block
        coding = replace(
            spec.coding,
            words=int(arrays["chunk_offsets"][chunks]),
            step_block=(min(block[0], max(rows, 1)), block[1]),
        )
        patches = int(arrays["patch_offsets"][chunks]) if spec.patches else 0
        return replace(spec, shape=shape, nnz=numel, patches=patches, coding=coding)
    nnz = int(arrays["tile_offsets"][numel // TILE]) if spec.bitmap else numel
    patches = int(arrays["patch_offsets"][numel // GROUP]) if spec.patches else 0
    return replace(spec, shape=shape, nnz=nnz, patches=patches)
