"""What to launch for a record on a CUDA device: kernels, grids and argument bytes.

Plain arithmetic on sizes and addresses, without CUDA: the emulated kernels of the tests get their
arguments from here as the real ones do.
"""

import functools
import struct
from collections.abc import Mapping, Sequence

import numpy as np

from endor.codecs import GROUP, TILE, DType, TensorSpec
from endor.errors import BackendError, DTypeError, ShapeError
from endor.kernels import gpu_int
from endor.kernels.gpu_launch import MAX_TENSORS, Kernel, Launch, Part

MAX_COLUMNS = 8
"""Columns of x that one product takes."""

WARPS = 8
"""Warps of an expansion block, each with a tile."""

SEGMENT = 1024
"""Columns that a warp of the product stages at a time."""

STAGING_SLACK = 32
READ_AHEAD = 128
"""Bytes after the last array that kernels may read (never use): the record's pad."""

TENSOR = np.dtype(
    [
        ("out", "<u8"),
        ("tile_offsets", "<u8"),
        ("bitmap", "<u8"),
        ("values", "<u8"),
        ("planes", "<u8"),
        ("patch_offsets", "<u8"),
        ("patch_ranks", "<u8"),
        ("patch_exponents", "<u8"),
        ("numel", "<u8"),
        ("nnz", "<u8"),
        ("plane_nbytes", "<u8"),
        ("first_unit", "<u8"),
        ("patches", "<u8"),
        ("n_planes", "<u4"),
        ("base", "<u4"),
    ]
)
"""`Tensor` of cuda/common.cuh."""

BATCH = np.dtype(
    [
        ("n_units", "<u8"),
        ("count", "<u4"),
        ("unused", "<u4"),
        ("tensors", TENSOR, (MAX_TENSORS,)),
    ]
)
"""`Batch` of cuda/common.cuh."""

PRODUCT = np.dtype(
    [
        ("tile_offsets", "<u8"),
        ("bitmap", "<u8"),
        ("values", "<u8"),
        ("x", "<u8"),
        ("y", "<u8"),
        ("nnz", "<u8"),
        ("rows", "<u4"),
        ("cols", "<u4"),
        ("batch", "<u4"),
        ("segment_nnz", "<u4"),
    ]
)
"""`Product` of cuda/product.cu."""

_OPERANDS, _OPERANDS_AT = struct.Struct("<QQ"), PRODUCT.fields["x"][1]  # type: ignore[index]
"""x and y, which lie side by side."""

_FIELDS = {"bytes": "values"}


def constants() -> tuple[tuple[str, int], ...]:
    """Return the definitions that every kernel is compiled with."""
    return (
        ("ENDOR_TILE", TILE),
        ("ENDOR_GROUP", GROUP),
        ("ENDOR_MAX_TENSORS", MAX_TENSORS),
        ("ENDOR_TENSOR_BYTES", TENSOR.itemsize),
    )


def raw_kernel(itemsize: int) -> Kernel:
    """Return the expansion of codec `raw` for elements of `itemsize` bytes."""
    return Kernel("expand_raw", (("ENDOR_ITEM_BYTES", itemsize),))


def exp_kernel(dtype: DType, *, bitmap: bool, planes: int) -> Kernel:
    """Return the expansion of codec `exp`.

    Args:
        dtype: Element type.
        bitmap: Whether the tensors have a bitmap.
        planes: Bit `P` set for every number `P` of bit planes that may come.
    """
    return Kernel(
        "expand_exp",
        (
            ("ENDOR_ITEM_BYTES", dtype.itemsize),
            ("ENDOR_EXPONENT_BITS", dtype.exponent_bits),
            ("ENDOR_MANTISSA_BITS", dtype.mantissa_bits),
            ("ENDOR_SIGNED", int(dtype.signed)),
            ("ENDOR_BITMAP", int(bitmap)),
            ("ENDOR_PLANES", planes),
        ),
    )


def product_kernel(dtype: DType, *, columns: int, row_pairs: int, float_out: bool) -> Kernel:
    """Return the product kernel that holds `columns` columns of x (1, 2, 4 or 8) in registers."""
    return Kernel(
        "product",
        (
            ("ENDOR_COLUMNS", columns),
            ("ENDOR_ROW_PAIRS", row_pairs),
            ("ENDOR_HALF", int(dtype.name == "F16")),
            ("ENDOR_FLOAT_OUT", int(float_out)),
            ("ENDOR_PRODUCT_BYTES", PRODUCT.itemsize),
        ),
    )


def plan_expansion(parts: Sequence[Part], *, warps: int = WARPS) -> list[Launch]:
    """Return the launches that write the dense form of `parts`.

    One launch for all tensors of a record that share codec, element type and bitmap (`int`: the
    type of its steps, and how they lie), which in a linear layer or an expert they do; `dense` and
    empty tensors need none.

    Args:
        warps: Warps of a block; in codec `exp` there are always as many as tiles in a group.

    Raises:
        BackendError: A tensor is in a codec that the GPU cannot expand.
        ShapeError: An address is not aligned as the kernels need it, or a row of a tensor in codec
            `int` is longer than its kernel takes.
    """
    families: dict[tuple[object, ...], list[Part]] = {}
    for part in parts:
        spec = part.spec
        if spec.codec == "dense" or spec.numel == 0:
            continue
        if spec.codec == "fields":
            raise BackendError(
                f"codec {spec.codec} has no GPU kernel yet; decode it on the CPU and copy the "
                "dense tensor"
            )
        part.check_alignment()
        families.setdefault(_family(spec), []).append(part)
    launches = []
    for members in families.values():
        for at in range(0, len(members), MAX_TENSORS):
            some = members[at : at + MAX_TENSORS]
            expand = gpu_int.expansion if some[0].spec.codec == "int" else _expansion
            launches.append(expand(some, warps))
    return launches


def _family(spec: TensorSpec) -> tuple[object, ...]:
    if spec.codec == "raw":
        return "raw", spec.dtype.itemsize
    if spec.codec == "exp":
        return "exp", spec.dtype.name, spec.bitmap
    return "int", *gpu_int.family(spec)


def _expansion(parts: Sequence[Part], warps: int) -> Launch:
    spec = parts[0].spec
    if spec.codec == "raw":
        kernel = raw_kernel(spec.dtype.itemsize)
    else:
        planes = 0
        for part in parts:
            planes |= 1 << part.spec.bit_planes
        kernel = exp_kernel(spec.dtype, bitmap=spec.bitmap, planes=planes)
        warps = GROUP // TILE  # a block takes a group
    batch = np.zeros(1, dtype=BATCH)
    units = 0
    for row, part in zip(batch["tensors"][0], parts, strict=False):
        row["out"] = part.out
        for suffix, address in part.addresses.items():
            row[_FIELDS.get(suffix, suffix)] = address
        row["numel"], row["nnz"] = part.spec.numel, part.spec.nnz
        row["patches"], row["base"] = part.spec.patches, part.spec.base
        row["first_unit"] = units
        if part.spec.codec == "exp":
            row["plane_nbytes"], row["n_planes"] = part.spec.plane_nbytes, part.spec.bit_planes
            units += -(-part.spec.numel // GROUP)
        else:
            units += part.spec.n_tiles
    batch["n_units"], batch["count"] = units, len(parts)
    slot = TILE * spec.dtype.itemsize + STAGING_SLACK
    shared = warps * slot if spec.bitmap else 0
    grid = units if spec.codec == "exp" else -(-units // warps)
    return Launch(kernel, batch, grid, 32 * warps, shared)


def product_refusal(spec: TensorSpec) -> str | None:
    """Return why the product kernel does not take such a tensor; None when it does."""
    if spec.codec != "raw" or spec.dtype.name not in ("BF16", "F16"):
        return f"it takes codec raw in BF16 or F16, not {spec.codec} in {spec.dtype.name}"
    if len(spec.shape) != 2 or spec.numel == 0:
        return f"it takes (rows, cols), not shape {spec.shape}"
    if spec.transposed:
        return "it takes no matrix that is stored transposed"
    if spec.shape[1] % 32:
        return f"cols must be a multiple of 32, got {spec.shape[1]}"
    if max(spec.shape) >= 1 << 31:
        return f"rows and cols must stay below 2**31, got {spec.shape}"
    return None


def segment_nnz(spec: TensorSpec, bitmap: np.ndarray) -> int:
    """Return the most stored elements in 1024 columns of a row, segments starting at column 0.

    Args:
        spec: A tensor that `product_refusal` takes.
        bitmap: Its bitmap on the host.
    """
    rows, cols = spec.shape
    words = bitmap.view("<u4")[: spec.numel // 32].reshape(rows, cols // 32)
    counts = np.bitwise_count(words)
    starts = np.arange(0, cols // 32, SEGMENT // 32)
    return int(np.add.reduceat(counts, starts, axis=1, dtype=np.int64).max())


def plan_product(
    spec: TensorSpec,
    addresses: Mapping[str, int],
    *,
    x: int,
    y: int,
    batch: int,
    float_out: bool = False,
    segment_nnz: int = SEGMENT,
    row_pairs: int | None = None,
    warps: int | None = None,
    shared_limit: int = 48 << 10,
) -> Launch:
    """Return the launch for `y = x @ W.T`.

    Args:
        spec: W, codec `raw`, BF16 or F16, `(rows, cols)` with cols a multiple of 32.
        addresses: Device address per array suffix.
        x: Address of `(batch, cols)` in W's element type, a multiple of 16.
        y: Address of `(batch, rows)`, in W's element type or fp32.
        batch: 1 to 8.
        float_out: y is fp32.
        segment_nnz: What `segment_nnz` returned, or more.
        row_pairs: Row pairs per warp; by default what the registers hold.
        warps: Warps per block; by default one per segment, at most 8.
        shared_limit: Shared memory that a block may take.

    Raises:
        DTypeError: The kernel does not take such a tensor.
        ShapeError: The batch is out of range, or an address is not aligned.
    """
    planned = _planned_product(
        spec,
        tuple(addresses.items()),
        batch,
        float_out,
        segment_nnz,
        row_pairs,
        warps,
        shared_limit,
    )
    for name, address in (("x", x), ("y", y)):
        if address % 16:
            raise ShapeError(f"{name} must start at a multiple of 16, got {address:#x}")
    args = bytearray(planned.args)  # copying a structured array takes ten times as long
    _OPERANDS.pack_into(args, _OPERANDS_AT, x, y)
    return Launch(
        planned.kernel,
        np.frombuffer(args, dtype=PRODUCT),
        planned.grid,
        planned.block,
        planned.shared_bytes,
    )


@functools.lru_cache(maxsize=8192)
def _planned_product(
    spec: TensorSpec,
    addresses: tuple[tuple[str, int], ...],
    batch: int,
    float_out: bool,
    segment_nnz: int,
    row_pairs: int | None,
    warps: int | None,
    shared_limit: int,
) -> Launch:
    """The launch without x and y: a decode step asks for the same ones at every token."""
    refusal = product_refusal(spec)
    if refusal:
        raise DTypeError(f"the product kernel cannot run: {refusal}; expand the weight instead")
    if not 1 <= batch <= MAX_COLUMNS:
        raise ShapeError(f"batch must be 1..{MAX_COLUMNS}, got {batch}; expand the weight instead")
    Part(spec, dict(addresses), 0).check_alignment()
    rows, cols = spec.shape
    columns = 1 << (batch - 1).bit_length()
    segment_nnz = min(segment_nnz, SEGMENT)
    slot = -(-(2 * segment_nnz + 32) // 16) * 16

    def shared_bytes(pairs: int, warps: int) -> int:
        return 128 + warps * 2 * pairs * (2 * slot + 256 + 4 * columns)

    pairs = row_pairs or (2 if columns <= 4 else 1)
    warps = warps or min(-(-cols // SEGMENT), 8)
    while shared_bytes(pairs, warps) > shared_limit and (pairs, warps) != (1, 1):
        pairs, warps = (pairs, warps - 1) if warps > 1 else (1, warps)
    args = np.zeros(1, dtype=PRODUCT)
    for suffix, address in addresses:
        args[suffix] = address
    args["nnz"], args["rows"], args["cols"] = spec.nnz, rows, cols
    args["batch"], args["segment_nnz"] = batch, segment_nnz
    kernel = product_kernel(spec.dtype, columns=columns, row_pairs=pairs, float_out=float_out)
    return Launch(kernel, args, -(-rows // (2 * pairs)), 32 * warps, shared_bytes(pairs, warps))
