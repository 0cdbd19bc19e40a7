"""Which scale each matrix gets, so that all of them together take the bits asked for."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from endor.codecs.rounding import LEAST_BITS
from endor.pruning.contract import Coded
from endor.quantization.contract import SPARSE, QuantizeOptions
from endor.quantization.ecq import Ecq
from endor.quantization.rates import Curve, share_out
from endor.quantization.timing import coding_seconds

RECORD_BYTES = 6240
"""What a tensor takes besides its arrays, on average: padding of its record (3.7 kB in SmolLM2) and
its part of the header (2.5 kB)."""

MOST_SHIFT_BITS = 1.0
"""Bits that a matrix may have more or fewer than asked for, to make up for others."""


class EcqQuantizer:
    """Quantises the matrices of a model one after the other, and keeps account of their sizes.

    Args:
        options: What to do.
    """

    def __init__(self, options: QuantizeOptions) -> None:
        self._options = options
        self.identity = repr(options)
        self._numel: dict[str, int] = {}
        self._left = 0.0
        self._curves: dict[str, list[Curve]] = {}
        self._offsets: dict[str, float] = {}

    def describe(self) -> dict[str, Any]:
        """Return what config.json says about it."""
        options = self._options
        return {"method": "ecq", "bits": options.bits}

    def begin(self, numel: Mapping[str, int]) -> None:
        """Learn what is to come."""
        self._numel = dict(numel)
        total = sum(numel.values())
        self._left = total * array_bits(self._options.bits, total / max(len(numel), 1))

    def quantize(
        self, name: str, weight: torch.Tensor, gram: torch.Tensor, dtype: torch.dtype
    ) -> Coded:
        """Return `weight` in codes."""
        # A layer's offsets cancel: they are left out of the account of what others have left.
        offset = self._offsets.get(name, 0.0)
        share = max(self._share() + offset, LEAST_BITS)
        coded = self._problem(weight, gram, dtype).fit(share)
        self._count(name, weight.numel(), coded.bits - offset)
        return coded

    def _problem(self, weight: torch.Tensor, gram: torch.Tensor, dtype: torch.dtype) -> Ecq:
        keep = zeros_to_keep(weight, self._options.keep_zeros)
        return Ecq(weight, gram, dtype=dtype, dampening=self._options.dampening, keep=keep)

    def survey(
        self,
        name: str,
        weight: torch.Tensor,
        gram: torch.Tensor,
        gradient: torch.Tensor | None,
        dtype: torch.dtype,
    ) -> None:
        """Learn what bits buy in a matrix of the layer that comes next."""
        problem = self._problem(weight, gram, dtype)
        worth = 0.0 if gradient is None else problem.worth(gradient)
        curve = Curve.of(problem, weight.numel(), worth, self._options.bits)
        self._curves.setdefault(name, []).append(curve)

    def share_out(self) -> None:
        """Decide on the bits of all matrices surveyed."""
        self._offsets = share_out(self._curves)
        self._curves = {}

    def seconds(self, shapes: Sequence[tuple[int, ...]]) -> float:
        """Return about how long matrices of `shapes` take on this processor."""
        return coding_seconds(shapes, self._options.bits)

    def adopt(self, name: str, bits: float) -> None:
        """Count a tensor that an earlier run has quantised."""
        self._count(name, self._numel[name], bits)

    def _share(self) -> float:
        """Return bits a weight for the next matrix: the mean of what is left for all to come.

        Held near what was asked for: a matrix of zeros must not fatten those behind it, nor a tiny
        one, which is mostly tables, starve them.
        """
        asked = self._options.bits
        share = self._left / sum(self._numel.values())
        return min(max(share, asked - MOST_SHIFT_BITS), asked + MOST_SHIFT_BITS)

    def _count(self, name: str, numel: int, bits: float) -> None:
        """Take `numel` weights of a tensor (of a stack, an expert at a time) off what is left."""
        self._left -= bits * numel
        self._numel[name] -= numel
        if not self._numel[name]:
            del self._numel[name]


def array_bits(bits: float, numel: float) -> float:
    """Return what a weight's share of the stored arrays may take, of `bits` in all.

    Args:
        bits: What was asked for.
        numel: Weights of a tensor: of a tiny one, padding would take everything.
    """
    return max(bits - 8 * RECORD_BYTES / max(numel, 1), 0.9 * bits)


def zeros_to_keep(weight: torch.Tensor, keep_zeros: bool | None) -> torch.Tensor | None:
    """Return which weights may be other than zero; None for all of them."""
    keep = weight != 0
    if keep_zeros is None:
        keep_zeros = float(keep.float().mean()) <= 1 - SPARSE
    return keep if keep_zeros and not bool(keep.all()) else None
