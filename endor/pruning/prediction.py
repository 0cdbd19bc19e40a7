"""Fits what guesses the active neurons of a feed-forward block: a logistic regression of low rank.

`up @ (down @ x) + bias > 0` names a neuron. It begins with the reduced-rank regression of activity
on inputs, found by subspace iteration (so that no matrix of inputs by neurons is ever made), and
is improved by some steps of logistic regression. Where a neuron is named is then moved, for all
alike, to where the wanted share of active ones is found in tokens that it was not fitted to; how
many are found, and named, is told of yet other tokens.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional

from endor.pruning.activations import batches

RANK = 64
"""Between input and neurons: 64 cost 2 to 3 % of the product with a first matrix of a 7B model."""

STEPS = 150
BATCH = 512
RATE = 2e-2
RIDGE = 1e-2
"""Share of the mean variance of inputs that is added to it."""

CHUNK = 1024
"""Tokens whose activity is unpacked together."""


@dataclass(frozen=True, slots=True)
class Fitted:
    """A predictor, and what it does to tokens that it has not seen.

    Attributes:
        down: bf16 `(rank, cols)`.
        up: bf16 `(rows, rank)`.
        bias: float32 `(rows,)`.
        recall: Share of the active neurons that it names.
        rows: Share of all neurons that it names.
        active: Share of all neurons that are active.
        tokens: How many tokens these shares are of.
    """

    down: torch.Tensor
    up: torch.Tensor
    bias: torch.Tensor
    recall: float
    rows: float
    active: float
    tokens: int


class Activity:
    """What a block was given, and which neurons were active: one bit each.

    Attributes:
        tokens: How many there are.
    """

    def __init__(self) -> None:
        self._inputs: list[torch.Tensor] = []
        self._bits: list[np.ndarray] = []
        self._neurons = 0
        self.tokens = 0

    def add(self, inputs: torch.Tensor, activation: torch.Tensor) -> None:
        """Note tokens: `(tokens, cols)` and `(tokens, neurons)`."""
        self._inputs.append(inputs.detach().to("cpu", torch.bfloat16))
        active = (activation.detach() != 0).cpu().numpy()
        self._bits.append(np.packbits(active, axis=1))
        self._neurons = active.shape[1]
        self.tokens += len(active)

    def inputs(self) -> torch.Tensor:
        """Return what it was given, bf16 `(tokens, cols)`."""
        return torch.cat(self._inputs)

    def bits(self) -> "Bits":
        """Return which neurons were active."""
        return Bits(np.concatenate(self._bits), self._neurons)


@dataclass(frozen=True, slots=True)
class Bits:
    """Booleans `(tokens, neurons)`, packed."""

    packed: np.ndarray
    neurons: int

    def at(self, tokens: "slice | np.ndarray") -> torch.Tensor:
        """Return those of some tokens, float32."""
        some = np.unpackbits(self.packed[tokens], axis=1, count=self.neurons)
        return torch.from_numpy(some).float()

    def times(self, matrix: torch.Tensor, tokens: range) -> torch.Tensor:
        """Return their product with a matrix `(neurons, n)`."""
        parts = batches(len(tokens), CHUNK)
        return torch.cat([self.at(slice(*_moved(part, tokens))) @ matrix for part in parts])

    def turned_times(self, matrix: torch.Tensor, tokens: range) -> torch.Tensor:
        """Return the product of their transpose with a matrix `(tokens, n)`."""
        out = torch.zeros(self.neurons, matrix.shape[1])
        for start, stop in batches(len(tokens), CHUNK):
            part = self.at(slice(*_moved((start, stop), tokens)))
            out.addmm_(part.T, matrix[start:stop])
        return out


def fit(seen: Activity, *, recall: float, rank: int = RANK, seed: int = 0) -> Fitted:
    """Return the predictor of one block.

    Of the tokens, in their order, two thirds are fitted to, a sixth says where a neuron is named,
    and a sixth what comes of it.

    Args:
        seen: Its inputs and active neurons.
        recall: Share of the active neurons to be named.
        rank: Of the predictor; at most the inputs.
        seed: Of random numbers; equal ones give equal predictors on one machine.
    """
    inputs, bits = seen.inputs(), seen.bits()
    cut, last = seen.tokens * 2 // 3, seen.tokens * 5 // 6
    train, choose, state = range(cut), range(cut, last), range(last, seen.tokens)
    generator = torch.Generator().manual_seed(seed)
    x = inputs[:cut].float()
    mean = x.mean(0)
    x -= mean
    down, up, bias = _begin(x, bits, train, min(rank, x.shape[1]), generator)
    down, up, bias = _improve(x, bits, down, up, bias, generator)
    down, up = down.bfloat16(), up.bfloat16()
    bias = bias - up.float() @ (down.float() @ mean)
    bias = bias - _threshold(inputs, bits, choose, (down, up, bias), recall)
    found = named = active = 0
    for start, stop in batches(len(state), CHUNK):
        tokens = slice(*_moved((start, stop), state))
        guess, truth = _scores(inputs[tokens], down, up, bias) > 0, bits.at(tokens) != 0
        found += int((guess & truth).sum())
        named += int(guess.sum())
        active += int(truth.sum())
    every = max(1, len(state) * bits.neurons)
    shares = (found / active if active else 1.0, named / every, active / every)
    return Fitted(down, up, bias, *shares, tokens=len(state))


def _begin(
    x: torch.Tensor, bits: Bits, tokens: range, rank: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the reduced-rank regression of activity on centred inputs, as logits."""
    gram = x.T @ x / len(x)
    gram.diagonal().add_(RIDGE * gram.diagonal().mean() + torch.finfo(torch.float32).tiny)
    factor = torch.linalg.cholesky(gram)
    share = bits.turned_times(torch.ones(len(tokens), 1), tokens)[:, 0] / len(tokens)
    right = torch.randn(bits.neurons, rank, generator=generator)
    for _ in range(3):
        centred = bits.times(right, tokens) - share @ right
        basis = torch.cholesky_solve(x.T @ centred / len(x), factor)
        # orthonormal whatever there is: where activity never changes, there are no directions
        basis = torch.linalg.qr(basis).Q
        z = x @ basis
        right = bits.turned_times(z, tokens) / len(x)
    scatter = z.T @ z / len(x)
    scatter.diagonal().add_(RIDGE * scatter.diagonal().mean() + torch.finfo(torch.float32).tiny)
    share = share.clamp(0.5 / len(tokens), 1 - 0.5 / len(tokens))
    spread = (share * (1 - share)).clamp_min(1e-3)
    up = torch.linalg.solve(scatter, right.T).T / spread[:, None]
    return basis.T.contiguous(), up, torch.logit(share)


def _improve(
    x: torch.Tensor,
    bits: Bits,
    down: torch.Tensor,
    up: torch.Tensor,
    bias: torch.Tensor,
    generator: torch.Generator,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the same after steps of logistic regression (Adam, a falling rate)."""
    # what lies between has a deviation of 1, so that one rate fits all of it
    size = 1 / (x @ down.T).std(0, correction=0).clamp_min(1e-6)[:, None]
    down, up = down * size, up / size.T
    wide = x.shape[1] ** -0.5
    parts = [part.clone().requires_grad_() for part in (down / wide, up, bias)]
    optimizer = torch.optim.Adam(parts, lr=RATE, fused=True)
    for step in range(STEPS):
        at = torch.randint(len(x), (BATCH,), generator=generator)
        for group in optimizer.param_groups:
            group["lr"] = RATE * (1 - step / STEPS)
        with torch.enable_grad():
            logits = (x[at] @ parts[0].T * wide) @ parts[1].T + parts[2]
            loss = functional.binary_cross_entropy_with_logits(logits, bits.at(at.numpy()))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return parts[0].detach() * wide, parts[1].detach(), parts[2].detach()


def _threshold(
    inputs: torch.Tensor,
    bits: Bits,
    tokens: range,
    parts: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    recall: float,
) -> float:
    """Return the score above which the wanted share of active neurons lies."""
    scores = []
    for part in batches(len(tokens), CHUNK):
        some = slice(*_moved(part, tokens))
        scores.append(_scores(inputs[some], *parts)[bits.at(some) != 0].numpy())
    every = np.concatenate([*scores, np.zeros(0, np.float32)])
    missed = int((1 - recall) * every.size)
    if not every.size:
        return 0.0
    return float(np.nextafter(np.partition(every, missed)[missed], np.float32(-np.inf)))


def _scores(
    inputs: torch.Tensor, down: torch.Tensor, up: torch.Tensor, bias: torch.Tensor
) -> torch.Tensor:
    return inputs.float() @ down.float().T @ up.float().T + bias


def _moved(part: tuple[int, int], tokens: range) -> tuple[int, int]:
    """Return the numbers of some tokens of a range."""
    return tokens.start + part[0], tokens.start + part[1]
