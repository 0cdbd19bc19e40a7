"""Gram matrices that may be singular or badly scaled, made safe to factor."""

from typing import cast

import torch

from endor.errors import PruningError


def prepare_gram(gram: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a copy of `gram` whose dead inputs have diagonal 1, and the bool `(cols,)` of them.

    Raises:
        PruningError: an entry is not finite.
    """
    if not bool(torch.isfinite(gram).all()):
        raise PruningError(
            "calibration statistic: must be finite, found NaN or infinity; the layer before "
            "diverged: prune less, dampen more or use other calibration text"
        )
    gram = gram.clone()
    dead = gram.diagonal() <= 0
    gram[dead] = 0.0
    gram[:, dead] = 0.0
    gram.diagonal()[dead] = 1.0
    return gram, dead


def damped_cholesky(gram: torch.Tensor, dampening: float, *, shift: float = 0.0) -> torch.Tensor:
    """Return the lower Cholesky factor of `gram + (shift + d mean(diag)) I`.

    d starts at `dampening` and grows tenfold up to 1 while the matrix is not positive definite
    in float32; then float64 gets the same attempts.

    Raises:
        PruningError: no attempt succeeded.
    """
    mean = float(gram.diagonal().mean()) + shift
    for dtype in (torch.float32, torch.float64):
        ridge = dampening
        while True:
            matrix = gram.to(dtype, copy=True)
            matrix.diagonal().add_(shift + ridge * mean)
            factor, failed = torch.linalg.cholesky_ex(matrix)
            if int(failed) == 0 and bool(torch.isfinite(factor).all()):
                return cast(torch.Tensor, factor.to(gram.dtype))
            if ridge >= 1:
                break
            ridge = min(max(ridge * 10, 1e-6), 1.0)
    raise PruningError(
        "calibration statistic: must be positive definite, is not at dampening 1; use more "
        "calibration text (samples x seq_len well above the layer's input width)"
    )


class ScaledProblem:
    """A layer's least squares, in the coordinates in which its Gram matrix has unit diagonal.

    In these coordinates |weight| is Wanda's score, one penalty fits all inputs, and an input that
    never fires has weight 0 and goes first.

    Attributes:
        weight: `(rows, cols)`, the dense weight times the input norms.
        gram: `(cols, cols)`, unit diagonal plus the ridge `dampening`.
    """

    def __init__(self, weight: torch.Tensor, gram: torch.Tensor, dampening: float) -> None:
        gram, self.dead = prepare_gram(gram)
        self._norm = gram.diagonal().sqrt()
        self.gram = gram.div_(self._norm).div_(self._norm[:, None])
        self.gram.diagonal().fill_(1.0 + dampening)
        self.weight = weight * self._norm
        self.weight[:, self.dead] = 0.0
        self._dense = weight

    def inverse(self, penalty: float) -> torch.Tensor:
        """Return (gram + penalty I)^-1."""
        return torch.cholesky_inverse(damped_cholesky(self.gram, 0.0, shift=penalty))

    def unscale(self, scaled: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
        """Return `scaled` in the layer's own coordinates, +0.0 where `keep` is false.

        A surviving weight of a dead input keeps its dense value.
        """
        weight = scaled / self._norm
        weight[:, self.dead] = self._dense[:, self.dead]
        return torch.where(keep, weight, 0.0)
