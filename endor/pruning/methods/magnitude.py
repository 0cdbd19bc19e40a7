"""Magnitude pruning: the smallest weights go, counted exactly, ties by index (lower goes first).

Works on the bits, because the magnitudes of IEEE numbers order like their bits without the sign:
no rounding, any element type, and NaN counts as largest, so it is kept. For 16-bit weights a
histogram of the 32768 magnitudes finds the threshold in one pass, without sorting.
"""

from typing import TYPE_CHECKING, Any

import numpy as np

from endor.codecs import DType, dtype
from endor.dtypes import TORCH_NAMES
from endor.errors import DTypeError, PruningError
from endor.kernels.threshold import count16, zero_below16
from endor.pruning.contract import Pattern, PruneOptions

if TYPE_CHECKING:
    import torch

CHUNK = 1 << 16
"""Weights looked at together: their magnitudes stay in the cache."""

ROWS_CHUNK = 1 << 20
"""Weights of whole rows looked at together where rows are the groups."""

PRUNABLE = ("BF16", "F16", "F32", "F8_E4M3", "F8_E5M2", "I8")


class Magnitude:
    """A `WeightPruner` that looks at nothing but the size of each weight.

    Attributes:
        options: Sparsity or pattern, and the names to leave alone.
        per_row: Whether each row gets the sparsity, and not each matrix as a whole.
    """

    def __init__(self, options: PruneOptions, *, per_row: bool = False) -> None:
        self.options = options
        self.per_row = per_row

    def describe(self) -> dict[str, Any]:
        """Return what config.json is to say about the pruning."""
        return {
            "method": "magnitude",
            "sparsity": self.options.target_sparsity,
            "pattern": self.options.pattern,
            "group": "row" if self.per_row else "matrix",
        }

    def prune(self, name: str, weight: "torch.Tensor") -> "torch.Tensor":
        """Return `weight` with its smallest elements set to +0.0; survivors keep their bits."""
        import torch

        code = TORCH_NAMES.get(str(weight.dtype).removeprefix("torch."), "")
        if code not in PRUNABLE:
            raise DTypeError(f"{name}: cannot prune {weight.dtype}; use a float type or int8")
        kind = dtype(code)
        host = weight.detach().to("cpu", copy=True).contiguous()
        flat = host.view(-1).view(torch.uint8).numpy()
        self.prune_bits(name, flat.view(kind.uint).reshape(host.shape), kind)
        return host.to(weight.device)

    def prune_bits(self, name: str, bits: np.ndarray, kind: DType) -> None:
        """Set the smallest elements of `bits` to zero, in place.

        Args:
            name: The tensor's, for the options' name patterns and for messages.
            bits: C-contiguous, unsigned, of `kind`'s width and the tensor's shape.
            kind: Element type; a float or int8.

        Raises:
            DTypeError: magnitudes of `kind` mean nothing.
            PruningError: the tensor has fewer than two dimensions.
        """
        if kind.name not in PRUNABLE:
            raise DTypeError(
                f"{name}: cannot prune {kind.name}, only {', '.join(PRUNABLE)}; leave the tensor "
                f"out: --exclude '{name}'"
            )
        if bits.ndim < 2:
            raise PruningError(
                f"{name}: only matrices and stacks of them are pruned, got shape {bits.shape}; "
                f"leave the tensor out: --exclude '{name}'"
            )
        if not bits.size or not self.options.selects(name):
            return
        pattern = self.options.parsed_pattern
        for matrix in bits.reshape(-1, *bits.shape[-2:]):
            if pattern.structured:
                prune_pattern(matrix, kind, pattern)
            elif self.per_row:
                prune_rows(matrix, kind, self.options.sparsity)
            else:
                zeros = zero_count(matrix.size, self.options.sparsity)
                prune_smallest(matrix.reshape(-1), kind, zeros)


class RowMagnitude(Magnitude):
    """`Magnitude` with the sparsity in every row."""

    def __init__(self, options: PruneOptions) -> None:
        super().__init__(options, per_row=True)


def zero_count(numel: int, sparsity: float) -> int:
    """Return how many of `numel` weights become zero: the nearest whole number."""
    return int(numel * sparsity + 0.5)


def magnitudes(bits: np.ndarray, kind: DType) -> np.ndarray:
    """Return unsigned integers that order like the absolute values of `bits`."""
    if kind.name == "I8":
        out: np.ndarray = np.abs(bits.view(np.int8)).view(np.uint8)
        return out
    sizes: np.ndarray = bits & bits.dtype.type(2 ** (8 * kind.itemsize - 1) - 1)
    return sizes


def prune_smallest(bits: np.ndarray, kind: DType, zeros: int) -> None:
    """Set the `zeros` smallest elements of flat `bits` to zero, in place.

    Zeros that are there already count.
    """
    if zeros <= 0:
        return
    if kind.itemsize == 2:
        threshold, ties = _nth(count16(bits, 0x7FFF), zeros)
        zero_below16(bits, 0x7FFF, threshold, ties)
        return
    threshold, ties = _threshold(bits, kind, zeros)
    for start in range(0, bits.size, CHUNK):
        part = bits[start : start + CHUNK]
        sizes = magnitudes(part, kind)
        if ties:
            tied = np.flatnonzero(sizes == threshold)[:ties]
            ties -= tied.size
            part[tied] = 0
        part *= (sizes >= threshold).view(np.uint8)


def _threshold(bits: np.ndarray, kind: DType, zeros: int) -> tuple[int, int]:
    """Return a magnitude, and how many elements of just that size go besides all smaller ones.

    Sees 8-bit elements, or 32-bit ones in two rounds of 16 bits.
    """
    low_bits = 16 if kind.itemsize == 4 else 0
    high, rest = _nth(_histogram(bits, kind, low_bits, None), zeros)
    if not low_bits:
        return high, rest
    low, rest = _nth(_histogram(bits, kind, low_bits, high), rest)
    return high << low_bits | low, rest


def _histogram(bits: np.ndarray, kind: DType, low_bits: int, high: int | None) -> np.ndarray:
    """Count the magnitudes' upper parts; or the lower parts of those whose upper part is `high`."""
    width = min(8 * kind.itemsize, 16)
    counts = np.zeros(1 << width, dtype=np.int64)
    for start in range(0, bits.size, CHUNK):
        sizes = magnitudes(bits[start : start + CHUNK], kind)
        if low_bits:
            upper = sizes >> np.uint32(low_bits)
            sizes = upper if high is None else sizes[upper == high] & np.uint32(0xFFFF)
        found = np.bincount(sizes)
        counts[: found.size] += found
    return counts


def _nth(counts: np.ndarray, zeros: int) -> tuple[int, int]:
    """Return the bin of the `zeros`-th smallest, and how many to take from that bin."""
    sums = np.cumsum(counts)
    at = int(np.searchsorted(sums, zeros))
    return at, zeros - int(sums[at] - counts[at])


def prune_rows(bits: np.ndarray, kind: DType, sparsity: float) -> None:
    """Set the smallest elements of every row of `(rows, cols)` to zero, in place.

    Row counts differ by at most one and sum to `zero_count` of the matrix.
    """
    rows, cols = bits.shape
    edges = np.arange(rows + 1) * zero_count(bits.size, sparsity) // max(rows, 1)
    counts = np.diff(edges)
    step = max(1, ROWS_CHUNK // max(cols, 1))
    for start in range(0, rows, step):
        part, wanted = bits[start : start + step], counts[start : start + step, None]
        if not wanted.any():
            continue
        sizes = magnitudes(part, kind)
        places = np.unique(np.maximum(wanted, 1)) - 1
        ordered = np.partition(sizes, places, axis=1)
        threshold = np.take_along_axis(ordered, np.maximum(wanted, 1) - 1, axis=1)
        below, tied = sizes < threshold, sizes == threshold
        room = wanted - np.count_nonzero(below, axis=1, keepdims=True)
        tied &= np.cumsum(tied, axis=1, dtype=np.int32) <= room
        below &= wanted > 0
        part *= (~(below | tied)).view(np.uint8)


def prune_pattern(bits: np.ndarray, kind: DType, pattern: Pattern) -> None:
    """Keep the `pattern.kept` largest of every `pattern.group` columns of `(rows, cols)`, in place.

    A short last group keeps up to that many as well.
    """
    cols = bits.shape[1]
    whole = cols // pattern.group * pattern.group
    step = max(1, ROWS_CHUNK // max(cols, 1))
    for start in range(0, bits.shape[0], step):
        part = bits[start : start + step]
        _prune_groups(part[:, :whole], kind, pattern.kept, pattern.group)
        if cols - whole > pattern.kept:
            _prune_groups(part[:, whole:], kind, pattern.kept, cols - whole)


def _prune_groups(bits: np.ndarray, kind: DType, kept: int, group: int) -> None:
    # One contiguous plane per place in the group; each pair of planes is compared once.
    planes = np.ascontiguousarray(magnitudes(bits, kind).reshape(-1, group).T)
    rank = np.zeros(planes.shape, dtype=np.uint16)
    for i in range(group):
        for j in range(i + 1, group):
            first = planes[i] <= planes[j]
            rank[j] += first
            rank[i] += ~first
    bits *= (rank >= group - kept).T.reshape(bits.shape).view(np.uint8)
