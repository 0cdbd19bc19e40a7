"""What to launch for a record on a CUDA device: kernels, grids and argument bytes.

Plain arithmetic on sizes and addresses, without CUDA: the emulated kernels of the tests get their
arguments from here as the real ones do.
"""

from collections.abc import Sequence

import numpy as np

from endor.codecs import GROUP, TILE, DType, TensorSpec
from endor.errors import BackendError
from endor.kernels import gpu_int
from endor.kernels.gpu_launch import MAX_TENSORS, Kernel, Launch, Part

WARPS = 8
"""Warps of an expansion block, each with a tile."""

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
