"""What codec `int` is given: codes, levels and steps, and the rules that they keep."""

from typing import NamedTuple

import numpy as np

from endor.codecs.coding import LANES, MAX_CODE, MAX_SYMBOLS
from endor.codecs.steps import SMALLEST
from endor.errors import ConfigError, DTypeError, EndorError, ShapeError


class Codes(NamedTuple):
    """A quantised tensor: elements are codes, or their levels, times steps.

    Attributes:
        codes: Integers of the tensor's shape; numbers of levels where there are some.
        steps: float32, in the layout that `integer.encode` takes; stored exactly.
        levels: float32 values that codes stand for.
        block: Rows and columns that share a step, where `steps` does not say.
    """

    codes: np.ndarray
    steps: np.ndarray
    levels: np.ndarray | None = None
    block: tuple[int, int] | None = None


def check_levels(
    levels: np.ndarray, steps: np.ndarray, error: type[EndorError] = ConfigError
) -> None:
    """Raise unless `levels` are 2 to 256 finite float32 values, and no product is subnormal."""
    if levels.dtype != np.float32 or levels.ndim != 1 or not 2 <= levels.size <= MAX_SYMBOLS:
        raise error(f"levels must be 2 to {MAX_SYMBOLS} values of float32")
    if not np.isfinite(levels).all():
        raise error("levels must be finite")
    least = [float(np.abs(values[values != 0]).min(initial=np.inf)) for values in (levels, steps)]
    if least[0] * least[1] < SMALLEST or least[0] < SMALLEST:
        raise error("levels times steps must be 0 or at least 2**-126")


def check_codes(codes: np.ndarray, shape: tuple[int, ...] | None) -> np.ndarray:
    """Return `codes` as C-contiguous int32 of `shape`.

    Raises:
        DTypeError: They are not integers.
        ConfigError: One exceeds 2**24 in magnitude.
        ShapeError: `shape` has another number of elements.
    """
    if codes.dtype.kind not in "iu":
        raise DTypeError(f"codes must be integers, got {codes.dtype}")
    if codes.size and (int(codes.min()) < -MAX_CODE or int(codes.max()) > MAX_CODE):
        raise ConfigError(f"codes must lie within +-{MAX_CODE}, got {codes.min()}..{codes.max()}")
    if shape is not None:
        if int(np.prod(shape, dtype=np.int64)) != codes.size:
            raise ShapeError(f"shape {shape} does not hold {codes.size} codes")
        codes = codes.reshape(shape)
    return np.ascontiguousarray(codes, dtype=np.int32).reshape(codes.shape)


def low_bits_of(codes: np.ndarray, shift: int, patched: np.ndarray) -> np.ndarray:
    """Return the packed low bits of flat codes, u8; those of a patch are 0.

    Args:
        codes: int32.
        shift: Bits of each code.
        patched: Indices.
    """
    low = np.zeros(-(-codes.size // LANES) * LANES, dtype=np.int32)
    low[: codes.size] = codes & np.int32((1 << shift) - 1)
    low[patched] = 0
    bits = low[:, None] >> np.arange(shift, dtype=np.int32) & 1
    return np.packbits(bits.astype(np.uint8), bitorder="little")
