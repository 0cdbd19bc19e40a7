"""ECQ: integer codes on a uniform grid of unlimited range, made to be entropy-coded.

The step of column j is `scale * U_jj`, U being the upper Cholesky factor of the inverse Gram
matrix: then every column adds the same to the squared output error, which is how an entropy coder's
rate buys most (WaterSIC, arXiv 2603.04956). Each column's error is spread over the columns after
it, as in GPTQ (arXiv 2210.17323). One number, the scale, sets error and rate of a matrix.

A value goes to the code that is best for error and rate together, at the exchange that a uniform
grid offers (6.02 dB a bit): the nearest one, or one nearer to zero when that is so much cheaper.
"""

import math

import numpy as np
import torch

from endor.codecs.integer import round_steps, size_bits
from endor.codecs.rounding import MOST_CODE, threshold_shifts
from endor.errors import QuantizationError
from endor.pruning.contract import Coded
from endor.pruning.linalg import damped_cholesky, prepare_gram

BLOCK = 64
"""Columns whose errors reach the columns behind them in one product."""

SAMPLE = 1 << 18
"""Weights that an estimate of the rate looks at."""


class Ecq:
    """One matrix, factored once, to be quantised at any scale.

    Args:
        weight: float32 `(rows, cols)`, not modified.
        gram: float32 `(cols, cols)`, mean x xᵀ of its inputs, not modified.
        dtype: Element type that values are rounded to.
        dampening: Ridge on the Gram matrix, as a share of its mean diagonal.
        keep: bool `(rows, cols)`: elsewhere codes are 0. None keeps all.

    Raises:
        QuantizationError: A weight is not finite.
        PruningError: The Gram matrix is not finite, or not positive definite at any dampening.
    """

    def __init__(
        self,
        weight: torch.Tensor,
        gram: torch.Tensor,
        *,
        dtype: torch.dtype,
        dampening: float = 0.01,
        keep: torch.Tensor | None = None,
    ) -> None:
        if not bool(torch.isfinite(weight).all()):
            raise QuantizationError("weights must be finite to be quantised; found NaN or infinity")
        gram, dead = prepare_gram(gram)
        # An input that never fires costs nothing: the ridge alone makes its step.
        gram.diagonal()[dead] = 0.0
        if bool(dead.all()):
            gram.diagonal().fill_(1.0)
        # Loud inputs first: their errors find the most columns to be undone in.
        self._order = gram.diagonal().argsort(descending=True, stable=True)
        # Of the Gram matrix with its columns reversed, the lower factor's inverse is U reversed.
        turned = self._order.flip(0)
        gram = gram[turned][:, turned]
        lower = damped_cholesky(gram, dampening)
        unit = torch.eye(len(gram), device=gram.device)
        inverse = torch.linalg.solve_triangular(lower, unit, upper=False)
        self._factor = inverse.flip(0, 1).contiguous()
        self._relative = self._factor.diagonal().clone()
        # Columns as rows: each is read and written in one piece.
        self._weight = weight.T[self._order].contiguous()
        self._keep = None if keep is None else keep.T[self._order].contiguous()
        self._dtype = dtype
        every = max(1, weight.numel() // SAMPLE)
        sample = self._weight[:, ::every] / self._relative[:, None]
        self._sample = sample if self._keep is None else sample * self._keep[:, ::every]
        self.overhead = 0.06 + 16 / max(len(weight), 1)
        """Bits a weight of tables and tiles, about, and of a step in each column."""
        peak = float((self._weight / self._relative[:, None]).abs().max()) if weight.numel() else 0
        # Of the scale's logarithm: all codes fit int16, and all of them are 0.
        self._least = math.log2(max(peak, 1e-30) / MOST_CODE)
        self._most = self._least + math.log2(MOST_CODE) + 2

    def estimate(self, scale: float) -> float:
        """Return about what a weight takes at `scale`, in bits: plain rounding of a sample.

        What steps, tables and tiles take is left out.
        """
        return entropy(histogram(self._rounded_sample(scale)))

    def scale_for(self, bits: float) -> float:
        """Return the scale at which a weight is estimated to take `bits`."""
        bits = max(bits - self.overhead, 0.0)
        low, high = self._least, self._most
        for _ in range(14):
            middle = (low + high) / 2
            if self.estimate(2**middle) > bits:
                low = middle
            else:
                high = middle
        return float(2**high)

    def worth(self, gradient: torch.Tensor) -> float:
        """Return what the square of the scale costs, a weight, up to a factor.

        The errors of the codes are uniform, independent, and as large as the scale, times the
        factor U: what they change of a loss has a variance of so many times that of the errors.

        Args:
            gradient: float32 `(rows, cols)`, of a random probe.
        """
        turned = gradient.T[self._order]
        return float((self._factor @ turned).square().mean())

    def code(self, scale: float) -> Coded:
        """Return codes and steps at `scale`."""
        scale = min(max(scale, 2**self._least), 2**self._most)
        rounded = round_steps((self._relative * scale).cpu().numpy())
        steps = torch.from_numpy(np.ascontiguousarray(rounded)).to(self._weight.device)
        shifts = self._shifts(scale)
        work = self._weight.clone()
        codes = torch.empty(work.shape, dtype=torch.int16, device=work.device)
        cols = len(work)
        for start in range(0, cols, BLOCK):
            stop = min(start + BLOCK, cols)
            keep = None if self._keep is None else self._keep[start:stop]
            local = self._factor[start:stop, start:stop]
            parts = work[start:stop], codes[start:stop], steps[start:stop]
            errors = self._code_block(*parts, local, keep, shifts)
            if stop < cols:
                work[stop:].addmm_(self._factor[start:stop, stop:].T, errors, alpha=-1)
        back = torch.empty_like(self._order)
        back[self._order] = torch.arange(cols, device=back.device)
        codes, steps = codes[back].T.contiguous(), steps[back]
        bits = size_bits(codes.cpu().numpy(), steps.cpu().numpy())
        return Coded(codes, steps, work[back].T.contiguous(), bits)

    def fit(self, bits: float, *, tolerance: float = 0.005) -> Coded:
        """Return codes that take `bits` a weight, within `tolerance` where codes can be had so."""
        scale = self.scale_for(bits)
        best = found = self.code(scale)
        for _ in range(4):
            if abs(best.bits - bits) <= tolerance:
                break
            scale *= 2 ** (found.bits - bits)
            found = self.code(scale)
            best = min(best, found, key=lambda one: abs(one.bits - bits))
        return best

    def _code_block(
        self,
        work: torch.Tensor,
        codes: torch.Tensor,
        steps: torch.Tensor,
        factor: torch.Tensor,
        keep: torch.Tensor | None,
        shifts: torch.Tensor,
    ) -> torch.Tensor:
        """Fill `codes`, put values in `work`, and return the scaled errors `(columns, rows)`."""
        errors = torch.empty_like(work)
        scales = (1 / factor.diagonal()).tolist()
        inverse = torch.where(steps > 0, 1 / steps, 0.0).tolist()
        sizes = steps.tolist()
        upper = factor.T.contiguous()  # row j: what column j takes from the errors before it
        last = len(shifts) - 1
        for at in range(len(work)):
            value = work[at]
            if at:
                value = torch.addmv(value, errors[:at].T, upper[at, :at], alpha=-1)
            size = (value * inverse[at]).abs_()
            nearest = (size + 0.5).long().clamp_max_(last)
            size.add_(0.5).sub_(shifts[nearest]).floor_().clamp_max_(MOST_CODE)
            if keep is not None:
                size.mul_(keep[at])
            code = torch.where(value < 0, -size, size)
            codes[at] = code
            dense = (code * sizes[at]).to(self._dtype).float()
            torch.sub(value, dense, out=errors[at]).mul_(scales[at])
            work[at] = dense + 0.0  # never -0.0
        return errors

    def _rounded_sample(self, scale: float) -> torch.Tensor:
        rounded: torch.Tensor = (self._sample / scale).round_()
        return rounded.clamp_(-MOST_CODE, MOST_CODE)

    def _shifts(self, scale: float) -> torch.Tensor:
        """See `threshold_shifts`."""
        counts = histogram(self._rounded_sample(scale).abs_())
        return torch.from_numpy(threshold_shifts(counts.cpu().numpy())).to(self._weight.device)


def histogram(codes: torch.Tensor) -> torch.Tensor:
    """Return how often each code occurs, from the least to the greatest, int64."""
    whole = codes.flatten().int()
    counts: torch.Tensor = torch.bincount(whole - whole.min()) if whole.numel() else whole
    return counts


def entropy(counts: torch.Tensor) -> float:
    """Return bits a code of the distribution that `counts` are of."""
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * shares.log2()).sum())
