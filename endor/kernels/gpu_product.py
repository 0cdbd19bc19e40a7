"""What to launch for a product from packed weights on a CUDA device: `cuda/product*.cu`.

Plain arithmetic on sizes and addresses, without CUDA, as in `gpu_plan`.
"""

import struct
from collections.abc import Mapping

import numpy as np

from endor.codecs import DType, TensorSpec
from endor.errors import DTypeError, ShapeError
from endor.kernels.gpu_launch import Kernel, Launch, Part

MAX_COLUMNS = 8
"""Columns of x that one product takes."""

MAX_WARPS = 8
"""Warps of a block, which share out the columns of its rows."""

WEIGHTS = 4096
"""Weights that a warp stages at a time: 4 rows of 1024 columns, or 8 of 512, or 16 of 256."""

SEGMENT = 256
"""Columns in which the stored elements of a row are counted, to size the slots of shared memory."""

PRODUCT = np.dtype(
    [
        ("tile_offsets", "<u8"),
        ("bitmap", "<u8"),
        ("values", "<u8"),
        ("x", "<u8"),
        ("y", "<u8"),
        ("planes", "<u8"),
        ("patch_offsets", "<u8"),
        ("patch_ranks", "<u8"),
        ("patch_exponents", "<u8"),
        ("plane_nbytes", "<u8"),
        ("patches", "<u8"),
        ("nnz", "<u4"),
        ("rows", "<u4"),
        ("cols", "<u4"),
        ("batch", "<u4"),
        ("capacity", "<u4"),
        ("base", "<u4"),
    ]
)
"""`Product` of cuda/product.cuh."""

_OPERANDS, _OPERANDS_AT = struct.Struct("<QQ"), PRODUCT.fields["x"][1]  # type: ignore[index]
"""x and y, which lie side by side."""

_FIELDS = {"bytes": "values"}


def product_kernel(
    dtype: DType,
    *,
    columns: int,
    rows: int,
    float_out: bool,
    bit_planes: int = 0,
    bitmap: bool = True,
) -> Kernel:
    """Return a product kernel.

    Args:
        dtype: BF16 or F16.
        columns: Columns of x at most: 1, 2, 4 or 8.
        rows: Rows of a warp: 4, 8, 16 or 32, a multiple of `2 * columns`.
        float_out: y is fp32.
        bit_planes: Those of codec `exp`; 0 for `raw`.
        bitmap: Whether the weight has one.
    """
    defines = (
        ("ENDOR_COLUMNS", columns),
        ("ENDOR_ROWS", rows),
        ("ENDOR_HALF", int(dtype.name == "F16")),
        ("ENDOR_FLOAT_OUT", int(float_out)),
        ("ENDOR_BITMAP", int(bitmap)),
        ("ENDOR_PRODUCT_BYTES", PRODUCT.itemsize),
    )
    if not bit_planes:
        return Kernel("product", defines)
    fields = (
        ("ENDOR_ITEM_BYTES", dtype.itemsize),
        ("ENDOR_EXPONENT_BITS", dtype.exponent_bits),
        ("ENDOR_MANTISSA_BITS", dtype.mantissa_bits),
        ("ENDOR_SIGNED", int(dtype.signed)),
        ("ENDOR_BIT_PLANES", bit_planes),
    )
    return Kernel("product_exp", (*defines, *fields))


def product_refusal(spec: TensorSpec) -> str | None:
    """Return why no product kernel takes such a tensor; None when one does."""
    if spec.codec not in ("raw", "exp") or spec.dtype.name not in ("BF16", "F16"):
        return f"it takes codecs raw and exp in BF16 or F16, not {spec.codec} in {spec.dtype.name}"
    if len(spec.shape) != 2 or spec.numel == 0:
        return f"it takes (rows, cols), not shape {spec.shape}"
    if spec.transposed:
        return "it takes no matrix that is stored transposed"
    if spec.shape[1] % 32:
        return f"cols must be a multiple of 32, got {spec.shape[1]}"
    if max(spec.shape) >= 1 << 31:
        return f"rows and cols must stay below 2**31, got {spec.shape}"
    if spec.nnz >= 1 << 32:
        return f"it takes fewer than 2**32 stored elements, got {spec.nnz}"
    return None


def segment_nnz(spec: TensorSpec, bitmap: np.ndarray | None) -> int:
    """Return the most stored elements in `SEGMENT` columns of a row, from column 0 on.

    Args:
        spec: A tensor that `product_refusal` takes.
        bitmap: Its bitmap on the host, if it has one.
    """
    if bitmap is None:
        return SEGMENT
    rows, cols = spec.shape
    words = bitmap.view("<u4")[: spec.numel // 32].reshape(rows, cols // 32)
    counts = np.bitwise_count(words)
    starts = np.arange(0, cols // 32, SEGMENT // 32)
    return int(np.add.reduceat(counts, starts, axis=1, dtype=np.int64).max())


def columns_of(batch: int) -> int:
    """Return the columns of the kernel that takes so many: 1, 2, 4 or 8."""
    return 1 << max(batch - 1, 0).bit_length()


def warp_rows(columns: int, codec: str) -> int:
    """Return the rows of a warp that cost least by the counts of docs/kernels-gpu.md.

    Many rows share x; chunks and patches of `exp` come in short pieces of many rows.
    """
    by_columns = {1: 4, 2: 8, 4: 16, 8: 32} if codec == "raw" else {1: 4, 2: 4, 4: 16, 8: 16}
    return by_columns[columns]


def plan_product(
    spec: TensorSpec,
    addresses: Mapping[str, int],
    *,
    x: int,
    y: int,
    batch: int,
    float_out: bool = False,
    segment_nnz: int = SEGMENT,
    rows: int | None = None,
    warps: int | None = None,
    shared_limit: int = 48 << 10,
) -> Launch:
    """Return the launch for `y = x @ W.T`.

    Args:
        spec: W, codec `raw` or `exp`, BF16 or F16, `(rows, cols)` with cols a multiple of 32.
        addresses: Device address per array suffix.
        x: Address of `(batch, cols)` in W's element type, a multiple of 16.
        y: Address of `(batch, rows)`, in W's element type or fp32.
        batch: 1 to 8.
        float_out: y is fp32.
        segment_nnz: What `segment_nnz` returned, or more.
        rows: Rows of a warp; by default what takes the fewest instructions.
        warps: Warps per block at most, 8 by default; none is planned that has nothing to do.
        shared_limit: Shared memory that a block may take.

    Raises:
        DTypeError: The kernel does not take such a tensor.
        ShapeError: The batch is out of range, or an address is not aligned.
    """
    refusal = product_refusal(spec)
    if refusal:
        raise DTypeError(f"the product kernel cannot run: {refusal}; expand the weight instead")
    if not 1 <= batch <= MAX_COLUMNS:
        raise ShapeError(f"batch must be 1..{MAX_COLUMNS}, got {batch}; expand the weight instead")
    Part(spec, addresses, 0).check_alignment()
    columns = columns_of(batch)
    each = rows or warp_rows(columns, spec.codec)
    n_rows, cols = spec.shape
    segment = WEIGHTS // each
    capacity = min(segment_nnz * max(segment // SEGMENT, 1), segment)
    packed = spec.codec == "exp"

    def warp_bytes() -> int:
        slot = -(-(2 * capacity + 32) // 16) * 16
        places = segment // 4 + 8
        return each * ((1 if packed else 2) * slot + places + 32 + (8 if packed else 0))

    segments = -(-cols // segment)
    most = min(warps or MAX_WARPS, max((shared_limit - 128) // warp_bytes(), 1), segments)
    share = -(-segments // most)
    used = -(-segments // share)
    args = np.zeros(1, dtype=PRODUCT)
    for suffix, address in addresses.items():
        args[_FIELDS.get(suffix, suffix)] = address
    args["nnz"], args["rows"], args["cols"] = spec.nnz, n_rows, cols
    args["batch"], args["capacity"] = batch, capacity
    if packed:
        args["plane_nbytes"], args["patches"] = spec.plane_nbytes, spec.patches
        args["base"] = spec.base
    kernel = product_kernel(
        spec.dtype,
        columns=columns,
        rows=each,
        float_out=float_out,
        bit_planes=spec.bit_planes if packed else 0,
        bitmap=spec.bitmap,
    )
    planned = Launch(kernel, args, -(-n_rows // each), 32 * used, 128 + used * warp_bytes())
    return with_operands(planned, x, y)


def with_operands(launch: Launch, x: int, y: int) -> Launch:
    """Return a launch of `plan_product` for another x and y; errors as there."""
    for name, address in (("x", x), ("y", y)):
        if address % 16:
            raise ShapeError(f"{name} must start at a multiple of 16, got {address:#x}")
    args = bytearray(launch.args)  # copying a structured array takes ten times as long
    _OPERANDS.pack_into(args, _OPERANDS_AT, x, y)
    return Launch(
        launch.kernel,
        np.frombuffer(args, dtype=PRODUCT),
        launch.grid,
        launch.block,
        launch.shared_bytes,
    )
