"""Which codec stores a tensor in the fewest bytes, from two statistics of its elements."""

from dataclasses import dataclass

import numpy as np

from endor.codecs.dtypes import DType
from endor.codecs.spec import MAX_NNZ, Codec, CodecChoice, TensorSpec
from endor.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Plan:
    """How to store a tensor; fields as in `TensorSpec`."""

    codec: Codec
    bitmap: bool
    k: int = 0
    base: int = 0
    patches: int = 0


def choose(
    numel: int,
    dtype: DType,
    nnz: int,
    histogram: np.ndarray,
    *,
    codec: CodecChoice = "auto",
    bitmap: bool | None = None,
) -> Plan:
    """Return the plan with the fewest stored bytes; on a tie the simplest.

    Args:
        numel: Elements of the dense tensor.
        dtype: Their type.
        nnz: Elements with any bit set.
        histogram: Counts of the exponent field over those, `(256,)`.
        codec: Restricts the choice unless `"auto"`.
        bitmap: Restricts it to plans with or without a bitmap unless None.

    Raises:
        ConfigError: No plan satisfies the restrictions.
    """
    plans: list[Plan] = []
    if codec in ("auto", "dense") and bitmap is not True:
        plans.append(Plan("dense", bitmap=False))
    if dtype.packable:
        with_bitmap = bitmap is not False and nnz <= MAX_NNZ
        if codec in ("auto", "raw") and with_bitmap:
            plans.append(Plan("raw", bitmap=True))
        if codec in ("auto", "exp") and with_bitmap:
            plans.append(_window(numel, dtype, nnz, histogram, bitmap=True))
        if codec in ("auto", "exp") and bitmap is not True:
            every = histogram.astype(np.int64)
            every[0] += numel - nnz
            plans.append(_window(numel, dtype, numel, every, bitmap=False))
    if not plans:
        raise ConfigError(
            f"codec {codec!r} with bitmap={bitmap} cannot store dtype {dtype.name} "
            f"({numel} elements, {nnz} non-zeros); use codec='auto'"
        )
    return min(plans, key=lambda plan: _nbytes(numel, dtype, nnz, plan))


def _nbytes(numel: int, dtype: DType, nnz: int, plan: Plan) -> int:
    stored = nnz if plan.bitmap else numel
    spec = TensorSpec(
        (numel,), dtype, plan.codec, plan.bitmap, stored, plan.k, plan.base, plan.patches
    )
    return spec.nbytes


def _window(numel: int, dtype: DType, stored: int, histogram: np.ndarray, *, bitmap: bool) -> Plan:
    """Return the `exp` plan whose window of `2**k` exponents costs least."""
    span = 1 << dtype.exponent_bits
    counts = np.asarray(histogram, dtype=np.int64)[:span]
    if not dtype.signed:  # windows of bytes wrap around
        counts = np.concatenate([counts, counts])
    sums = np.concatenate([[0], np.cumsum(counts)])
    plans = []
    for k in range(1, dtype.exponent_bits + 1):
        width = 1 << k
        starts = span - width + 1 if dtype.signed else span
        covered = sums[width : width + starts] - sums[:starts]
        base = int(np.argmax(covered))
        plans.append(Plan("exp", bitmap, k, base, stored - int(covered[base])))
    return min(plans, key=lambda plan: _nbytes(numel, dtype, stored, plan))
