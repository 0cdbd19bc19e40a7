"""Launches that expand codec `int` on a CUDA device."""

from collections.abc import Sequence

import numpy as np

from endor.codecs import TensorSpec
from endor.codecs.coding import CHUNK, LANES, LOWEST, SCALE, SCALE_BITS, matrix_shape
from endor.errors import ShapeError
from endor.kernels.gpu_launch import MAX_TENSORS, Kernel, Launch, Part

TENSOR = np.dtype(
    [
        ("out", "<u8"),
        ("steps", "<u8"),
        ("frequencies", "<u8"),
        ("levels", "<u8"),
        ("chunk_offsets", "<u8"),
        ("states", "<u8"),
        ("words", "<u8"),
        ("low_bits", "<u8"),
        ("patch_offsets", "<u8"),
        ("patch_ranks", "<u8"),
        ("patch_codes", "<u8"),
        ("numel", "<u8"),
        ("n_words", "<u8"),
        ("patches", "<u8"),
        ("first_block", "<u8"),
        ("cols", "<u4"),
        ("step_cols", "<u4"),
        ("block_rows", "<u4"),
        ("block_cols", "<u4"),
        ("symbols", "<u4"),
        ("shift", "<u4"),
        ("base", "<i4"),
        ("scale", "<f4"),
        ("scale_too", "<f4"),
        ("unused", "<u4"),
    ]
)
"""`IntTensor` of cuda/expand_int.cu."""

BATCH = np.dtype([("count", "<u4"), ("unused", "<u4"), ("tensors", TENSOR, (MAX_TENSORS,))])
"""`IntBatch` of cuda/expand_int.cu."""

TABLE_BYTES = 4 * SCALE + 1040
RING_BYTES = 2048
"""Shared memory of a block, and of each of its warps."""

_TYPES = {"BF16": 0, "F16": 1, "F32": 2}
_ALL_ROWS = (1 << 32) - 1
_NEAR = range(-126, 128)
"""Exponents of two that a float32 holds as normal numbers."""

Family = tuple[str, str, bool, bool, bool, bool]


def family(spec: TensorSpec) -> Family:
    """Return what tensors of one launch share: types, how steps lie, low bits or levels."""
    coding = spec.coding
    assert coding is not None
    by_column = coding.step_shape(spec.shape)[0] == 1 and coding.step_block[1] == 1
    return (
        spec.dtype.name,
        coding.step_dtype,
        by_column and matrix_shape(spec.shape)[1] >= LANES,
        coding.step_exponent not in _NEAR,
        coding.shift > 0,
        coding.levels,
    )


def kernel(
    value: str,
    step: str,
    *,
    column_steps: bool,
    far_steps: bool,
    low_bits: bool,
    levels: bool = False,
) -> Kernel:
    """Return the expansion of codec `int`.

    Args:
        value: Element type: `"BF16"`, `"F16"` or `"F32"`.
        step: Stored type of the steps, one of the same.
        column_steps: There is one step for each column, and at least 32 columns.
        far_steps: The exponent of the steps is no normal float32.
        low_bits: Codes have low bits beside their symbols.
        levels: Symbols stand for levels.
    """
    return Kernel(
        "expand_int",
        (
            ("ENDOR_VALUE", _TYPES[value]),
            ("ENDOR_STEP", _TYPES[step]),
            ("ENDOR_COLUMN_STEPS", int(column_steps)),
            ("ENDOR_FAR_STEPS", int(far_steps)),
            ("ENDOR_LOW_BITS", int(low_bits)),
            ("ENDOR_LEVELS", int(levels)),
            ("ENDOR_INT_TENSOR_BYTES", TENSOR.itemsize),
            ("ENDOR_LANES", LANES),
            ("ENDOR_CHUNK", CHUNK),
            ("ENDOR_SCALE", SCALE),
            ("ENDOR_SCALE_BITS", SCALE_BITS),
            ("ENDOR_LOWEST", LOWEST),
        ),
    )


def expansion(parts: Sequence[Part], warps: int) -> Launch:
    """Return the launch that writes the dense form of `parts`, at most 8 of one family.

    Raises:
        ShapeError: A tensor has rows of 2**31 elements or more.
    """
    value, step, column_steps, far_steps, low_bits, levels = family(parts[0].spec)
    batch = np.zeros(1, dtype=BATCH)
    blocks = 0
    for row, part in zip(batch["tensors"][0], parts, strict=False):
        spec = part.spec
        coding = spec.coding
        assert coding is not None
        cols = matrix_shape(spec.shape)[1]
        if cols >= 1 << 31:
            raise ShapeError(
                f"the GPU kernel of codec int takes rows of less than 2**31 elements, not {cols}: "
                "decode the tensor on the CPU"
            )
        row["out"] = part.out
        for suffix, address in part.addresses.items():
            row[suffix] = address
        row["numel"], row["n_words"], row["patches"] = spec.numel, coding.words, spec.patches
        row["first_block"], row["cols"] = blocks, cols
        step_rows, row["step_cols"] = coding.step_shape(spec.shape)
        row["block_rows"] = coding.step_block[0] if step_rows > 1 else _ALL_ROWS
        row["block_cols"] = coding.step_block[1]
        row["symbols"], row["shift"], row["base"] = coding.symbols, coding.shift, coding.base
        row["scale"], row["scale_too"] = _scales(coding.step_exponent, far=far_steps)
        blocks += -(-spec.numel // (CHUNK * warps))
    batch["count"] = len(parts)
    chosen = kernel(
        value,
        step,
        column_steps=column_steps,
        far_steps=far_steps,
        low_bits=low_bits,
        levels=levels,
    )
    return Launch(chosen, batch, blocks, 32 * warps, TABLE_BYTES + warps * RING_BYTES)


def _scales(exponent: int, *, far: bool) -> tuple[np.float32, np.float32]:
    """Two powers of two whose product is 2**exponent; the second is 1 unless `far`."""
    first = exponent // 2 if far else exponent
    return np.float32(2.0**first), np.float32(2.0 ** (exponent - first))
