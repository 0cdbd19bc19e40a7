"""Steps of codec `int`: how they are stored, and what value a code has."""

import numpy as np

from endor.codecs.coding import Coding, matrix_shape
from endor.codecs.dtypes import DType
from endor.errors import ConfigError, FormatError, ShapeError

SMALLEST = 2.0**-126
"""Least magnitude of a step that is not 0: products of codes are then never subnormal, which
processors may be set to flush."""

_TOP = 15
"""The largest step, stored as float16, lies in [2**14, 2**15)."""


def round_steps(steps: np.ndarray | float) -> np.ndarray:
    """Return the nearest steps that take 16 bits each, float32, same shape.

    Float16 times one power of two, so that the largest has 11 significant bits and one that is
    2**-28 times as large still has 11. A step that is not 0 does not become 0.

    Raises:
        ConfigError: A step is not finite.
    """
    values = _finite(steps)
    exponent = _exponent(values)
    scaled = np.ldexp(values, -exponent)
    rounded = scaled.astype(np.float16).astype(np.float64)
    tiny = np.ldexp(1.0, max(-24, -126 - exponent))
    rounded = np.where((values != 0) & (np.abs(rounded) < tiny), np.copysign(tiny, values), rounded)
    out: np.ndarray = np.ldexp(rounded, exponent).astype(np.float32)
    return out


def store_steps(steps: np.ndarray) -> tuple[str, int, np.ndarray]:
    """Return the smallest stored form that holds float32 `steps` exactly.

    Returns:
        Safetensors code, exponent, and the unsigned bits of the stored values.
    """
    exponent = _exponent(steps)
    scaled = np.ldexp(steps.astype(np.float64), -exponent)
    half = scaled.astype(np.float16)
    if np.array_equal(half.astype(np.float64), scaled):
        return "F16", exponent, half.view("<u2")
    bits = np.ascontiguousarray(steps, dtype=np.float32).view("<u4")
    if not (bits & np.uint32(0xFFFF)).any():
        return "BF16", 0, (bits >> np.uint32(16)).astype("<u2")
    return "F32", 0, bits


def load_steps(coding: Coding, stored: np.ndarray) -> np.ndarray:
    """Return stored steps as float32."""
    if coding.step_dtype == "F32":
        return stored.view(np.float32)
    if coding.step_dtype == "BF16":
        return (stored.astype(np.uint32) << np.uint32(16)).view(np.float32)
    with np.errstate(over="ignore"):
        wide = np.ldexp(stored.view(np.float16).astype(np.float64), coding.step_exponent)
        return wide.astype(np.float32)


def check_steps(coding: Coding, stored: np.ndarray) -> None:
    """Raise `FormatError` unless every stored step is 0, or finite and normal in float32."""
    steps = load_steps(coding, stored)
    magnitudes = np.abs(steps[steps != 0])
    if not np.isfinite(steps).all() or (magnitudes < SMALLEST).any():
        raise FormatError("steps must be 0, or finite and at least 2**-126")
    if coding.step_dtype == "F16":
        whole = np.count_nonzero(stored & np.uint16(0x7FFF))
        if whole != magnitudes.size:  # underflow on the way to float32
            raise FormatError("steps must be 0, or finite and at least 2**-126")


def steps_for(
    steps: np.ndarray | float, shape: tuple[int, ...], block: tuple[int, int] | None
) -> tuple[np.ndarray, tuple[int, int]]:
    """Return steps as float32 `(R, C)` and the rows and columns that share one.

    Raises:
        ConfigError: A step is not finite or too small.
        ShapeError: The steps do not divide a tensor of `shape` into equal blocks.
    """
    values = _finite(steps)
    if values.ndim > 2:
        values = values.reshape(-1, values.shape[-1])
    values = values.reshape(1, -1) if values.ndim < 2 else values
    single = values.astype(np.float32)
    if ((single != 0) & (np.abs(single) < SMALLEST)).any() or ((values != 0) & (single == 0)).any():
        raise ConfigError("steps must be 0 or at least 2**-126; call round_steps first")
    sizes = matrix_shape(shape)
    if block is None:
        blocks = []
        for size, count in zip(sizes, values.shape, strict=True):
            if size and (not count or size % count):
                raise ShapeError(
                    f"steps {values.shape} must divide a tensor of shape {shape}; give `block`"
                )
            blocks.append(max(size // max(count, 1), 1))
        block = blocks[0], blocks[1]
        if 0 in sizes:  # no elements, no steps along that axis
            single = single[: sizes[0], : sizes[1]]
    expected = tuple(-(-size // side) for size, side in zip(sizes, block, strict=True))
    if single.shape != expected:
        raise ShapeError(
            f"steps must have shape {expected} for a tensor of shape {shape} in blocks of {block}, "
            f"got {values.shape}"
        )
    return single, block


def spread(coding: Coding, steps: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Return the step of every element, float32 `(rows, cols)`, a view where it can be one."""
    rows, cols = matrix_shape(shape)
    out = steps
    for axis, size in enumerate((rows, cols)):
        if out.shape[axis] != 1:
            out = np.repeat(out, coding.step_block[axis], axis=axis)
            out = out[:size] if axis == 0 else out[:, :size]
    return np.broadcast_to(out, (rows, cols))


def to_dtype(values: np.ndarray, dtype: DType) -> np.ndarray:
    """Return float32 `values`, none of them NaN, rounded to nearest even, as bits of `dtype`."""
    if dtype.name == "F32":
        return values.view(np.uint32)
    if dtype.name == "F16":
        with np.errstate(over="ignore"):
            return values.astype(np.float16).view(np.uint16)
    bits = values.view(np.uint32)
    odd = bits >> np.uint32(16) & np.uint32(1)
    return ((bits + np.uint32(0x7FFF) + odd) >> np.uint32(16)).astype(np.uint16)


def _finite(steps: np.ndarray | float) -> np.ndarray:
    values = np.asarray(steps, dtype=np.float64)
    if not (np.abs(values) <= np.finfo(np.float32).max).all():
        raise ConfigError("steps must be finite in float32")
    return values


def _exponent(values: np.ndarray) -> int:
    """Return the power of two that brings the largest of `values` into [2**14, 2**15)."""
    largest = float(np.abs(values).max(initial=0.0))
    return int(np.frexp(largest)[1]) - _TOP if largest else 0
