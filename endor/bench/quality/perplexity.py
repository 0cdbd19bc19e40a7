"""Perplexity of a causal language model, and its agreement with a reference model.

Two conventions, told apart by `stride`:

- `stride == window`: consecutive windows that do not overlap; the short tail is dropped unless it
  is all there is. This is how GPTQ, SparseGPT and Wanda report perplexity.
- `stride < window`: the strided recipe of the Hugging Face documentation: every window sees up to
  `window - stride` tokens of context that are not scored again; the tail counts.

Either way a token is scored at most once, the sum of negative log-likelihoods is divided by exactly
the number of scored tokens, and the first token of a window that starts without context is not
scored. Figures of different window lengths do not compare, nor those of different tokenizers, save
for `bits_per_byte`.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from endor.errors import ConfigError, ShapeError

_CHUNK = 128
"""Positions turned into float32 log-probabilities at once: 64 MiB at a vocabulary of 128 K."""

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Window:
    """Tokens `[begin, end)` are read; those in `[target_begin, end)` are scored."""

    begin: int
    end: int
    target_begin: int


@dataclass(frozen=True, slots=True)
class EvalTokens:
    """A tokenised text.

    Attributes:
        ids: `(tokens,)` int64, without special tokens.
        byte_ends: For each token, the UTF-8 offset in the text at which it ends; None when unknown.
        bos: Token put before every window, not scored; None for none.
    """

    ids: torch.Tensor
    byte_ends: tuple[int, ...] | None = None
    bos: int | None = None


@dataclass(frozen=True, slots=True)
class Perplexity:
    """Perplexity over the windows of one text.

    Attributes:
        perplexity: exp(mean negative log-likelihood per scored token).
        nll: That mean, in nats per token.
        nll_stderr: Its standard error over windows; NaN with one window. The difference of two
            models on one text is known far better: `Agreement.nll_difference_stderr`.
        bits_per_byte: Total negative log2-likelihood per scored byte; None when bytes are unknown.
        window, stride: In tokens, as evaluated.
        windows, tokens: How many windows were read and how many tokens were scored.
        bos: Whether every window started with the beginning-of-sequence token.
        seconds: Wall time of the forward passes and the scoring.
        window_nll: Mean nats per token of each window, for paired comparisons.
    """

    perplexity: float
    nll: float
    nll_stderr: float
    bits_per_byte: float | None
    window: int
    stride: int
    windows: int
    tokens: int
    bos: bool
    seconds: float
    window_nll: tuple[float, ...] = field(repr=False)


@dataclass(frozen=True, slots=True)
class Agreement:
    """How closely a model follows a reference on the same windows.

    Attributes:
        model, reference: Perplexity of each.
        kl: Mean KL(reference || model) per scored token, nats. Exactly 0 when the logits are equal.
        kl_stderr: Standard error over windows; NaN with one window.
        top1: Share of scored tokens at which both rank the same token first.
        nll_difference: Mean of model minus reference over the windows, nats per token.
        nll_difference_stderr: Standard error of that paired difference; NaN with one window.
    """

    model: Perplexity
    reference: Perplexity
    kl: float
    kl_stderr: float
    top1: float
    nll_difference: float
    nll_difference_stderr: float


def windows(
    tokens: int, *, window: int, stride: int | None = None, max_windows: int | None = None
) -> list[Window]:
    """Split `tokens` tokens into windows; see the module's docstring for the two conventions.

    Raises:
        ConfigError: `window` below 2, `stride` outside 1..window, or `max_windows` below 1.
        ShapeError: Fewer than 2 tokens, so that nothing can be scored.
    """
    stride = window if stride is None else stride
    if window < 2:
        raise ConfigError(f"window must be at least 2 tokens, got {window}")
    if not 1 <= stride <= window:
        raise ConfigError(f"stride must lie in 1..window ({window}), got {stride}")
    if max_windows is not None and max_windows < 1:
        raise ConfigError(f"max_windows must be at least 1, got {max_windows}")
    if tokens < 2:
        raise ShapeError(f"the text must have at least 2 tokens to be scored, got {tokens}")
    found: list[Window] = []
    scored_end = 0
    for begin in range(0, tokens, stride):
        end = min(begin + window, tokens)
        if stride == window and end - begin < window and found:
            break
        # A window without context cannot score its first token.
        found.append(Window(begin, end, max(begin + 1, scored_end)))
        scored_end = end
        if end == tokens or len(found) == max_windows:
            break
    return found


def tokenize(text: str, tokenizer: Any, *, bos: bool | None = None) -> EvalTokens:
    """Tokenise `text` for evaluation, with the byte offset at which each token ends.

    Args:
        text: The text.
        tokenizer: A transformers tokenizer; byte offsets need a fast one.
        bos: Whether to start each window with the beginning-of-sequence token. None does what the
            tokenizer does by itself (Gemma and Llama add one, and Gemma is useless without).

    Raises:
        ConfigError: `bos` is true and the tokenizer has no such token.
    """
    if bos is None:
        bos = tokenizer.bos_token_id is not None and tokenizer("a").input_ids[0] == (
            tokenizer.bos_token_id
        )
    if bos and tokenizer.bos_token_id is None:
        raise ConfigError(
            "bos=True needs a tokenizer with a beginning-of-sequence token; pass False"
        )
    fast = bool(getattr(tokenizer, "is_fast", False))
    # verbose=False: a text longer than the model's context is what windows are for.
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=fast, verbose=False)
    byte_ends: tuple[int, ...] | None = None
    if fast:
        ends = [0]
        for character in text:
            ends.append(ends[-1] + len(character.encode("utf-8", "surrogatepass")))
        byte_ends = tuple(ends[stop] for _, stop in encoding["offset_mapping"])
    return EvalTokens(
        torch.tensor(encoding["input_ids"], dtype=torch.int64),
        byte_ends,
        tokenizer.bos_token_id if bos else None,
    )


def perplexity(
    model: Any,
    tokens: EvalTokens,
    *,
    window: int = 512,
    stride: int | None = None,
    max_windows: int | None = None,
    progress: Progress | None = None,
) -> Perplexity:
    """Perplexity of `model` on `tokens`.

    Args:
        model: A transformers causal language model: `model(input_ids=..., use_cache=False).logits`.
        tokens: From `tokenize`.
        window: Tokens per window.
        stride: Tokens between window starts; `window` when omitted.
        max_windows: Stop after so many windows.
        progress: Called with (windows done, windows in all).

    Raises:
        ConfigError, ShapeError: See `windows`.
    """
    plan = windows(len(tokens.ids), window=window, stride=stride, max_windows=max_windows)
    sums: list[float] = []
    started = time.perf_counter()
    for done, item in enumerate(plan, 1):
        logits, targets = _scored_logits(model, tokens, item)
        sums.append(
            sum(
                -float(chunk.gather(1, want.unsqueeze(1)).double().sum())
                for chunk, want in _log_probabilities(logits, targets)
            )
        )
        if progress is not None:
            progress(done, len(plan))
    return _summary(sums, plan, tokens, window, stride, time.perf_counter() - started)


def agreement(
    model: Any,
    reference: Any,
    tokens: EvalTokens,
    *,
    window: int = 512,
    stride: int | None = None,
    max_windows: int | None = None,
    progress: Progress | None = None,
) -> Agreement:
    """Perplexity of both models and how closely `model` follows `reference`, window by window.

    Arguments are those of `perplexity`; both models are called on each window in turn, so both are
    in memory and no logits are stored.

    Raises:
        ConfigError, ShapeError: See `windows`; also when the vocabularies differ in size.
    """
    plan = windows(len(tokens.ids), window=window, stride=stride, max_windows=max_windows)
    sums: tuple[list[float], list[float]] = ([], [])
    kl_sums: list[float] = []
    same_top = 0
    seconds = [0.0, 0.0]
    for done, item in enumerate(plan, 1):
        times = [time.perf_counter()]
        logits, targets = _scored_logits(model, tokens, item)
        times.append(time.perf_counter())
        wanted, _ = _scored_logits(reference, tokens, item)
        times.append(time.perf_counter())
        if logits.shape[1] != wanted.shape[1]:
            raise ShapeError(
                f"agreement needs one vocabulary: the model has {logits.shape[1]} tokens, "
                f"the reference {wanted.shape[1]}"
            )
        kl = nll = reference_nll = 0.0
        chunks = zip(
            _log_probabilities(logits, targets),
            _log_probabilities(wanted.to(logits.device), targets),
            strict=True,
        )
        for (mine, want), (theirs, _) in chunks:
            nll -= float(mine.gather(1, want.unsqueeze(1)).double().sum())
            reference_nll -= float(theirs.gather(1, want.unsqueeze(1)).double().sum())
            # -inf - -inf would be NaN where a model masks a token; such a token adds nothing.
            terms = theirs.exp() * (theirs - mine)
            kl += float(torch.where(theirs.isneginf(), 0.0, terms).double().sum())
            same_top += int((mine.argmax(1) == theirs.argmax(1)).sum())
        sums[0].append(nll)
        sums[1].append(reference_nll)
        kl_sums.append(kl)
        # The scoring of both is not told apart; each model's time is its forward passes.
        seconds[0] += times[1] - times[0]
        seconds[1] += times[2] - times[1]
        if progress is not None:
            progress(done, len(plan))
    own = _summary(sums[0], plan, tokens, window, stride, seconds[0])
    other = _summary(sums[1], plan, tokens, window, stride, seconds[1])
    counts = [item.end - item.target_begin for item in plan]
    differences = [a - b for a, b in zip(own.window_nll, other.window_nll, strict=True)]
    return Agreement(
        model=own,
        reference=other,
        kl=sum(kl_sums) / own.tokens,
        kl_stderr=_stderr([k / n for k, n in zip(kl_sums, counts, strict=True)]),
        top1=same_top / own.tokens,
        nll_difference=sum(differences) / len(differences),
        nll_difference_stderr=_stderr(differences),
    )


def _scored_logits(
    model: Any, tokens: EvalTokens, item: Window
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the logits `(scored, vocabulary)` that predict the scored tokens, and those tokens."""
    ids = tokens.ids[item.begin : item.end]
    lead = 0
    if tokens.bos is not None:
        ids = torch.cat([ids.new_tensor([tokens.bos]), ids])
        lead = 1
    with torch.inference_mode():
        logits = model(input_ids=ids.unsqueeze(0).to(model.device), use_cache=False).logits[0]
    first = lead + item.target_begin - item.begin
    # The logits at position p predict the token at p + 1.
    return logits[first - 1 : -1], ids[first:].to(logits.device)


def _log_probabilities(
    logits: torch.Tensor, targets: torch.Tensor
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    for start in range(0, len(targets), _CHUNK):
        part = slice(start, start + _CHUNK)
        yield logits[part].float().log_softmax(1), targets[part]


def _summary(
    sums: Sequence[float],
    plan: Sequence[Window],
    tokens: EvalTokens,
    window: int,
    stride: int | None,
    seconds: float,
) -> Perplexity:
    counts = [item.end - item.target_begin for item in plan]
    total, scored = sum(sums), sum(counts)
    mean = total / scored
    bits_per_byte = None
    if tokens.byte_ends is not None:
        ends = tokens.byte_ends
        scored_bytes = sum(ends[item.end - 1] - ends[item.target_begin - 1] for item in plan)
        bits_per_byte = total / math.log(2) / scored_bytes if scored_bytes else None
    window_nll = tuple(s / n for s, n in zip(sums, counts, strict=True))
    return Perplexity(
        perplexity=math.exp(mean) if mean < 700 else math.inf,
        nll=mean,
        nll_stderr=_stderr(window_nll),
        bits_per_byte=bits_per_byte,
        window=window,
        stride=window if stride is None else stride,
        windows=len(plan),
        tokens=scored,
        bos=tokens.bos is not None,
        seconds=seconds,
        window_nll=window_nll,
    )


def _stderr(values: Sequence[float]) -> float:
    """Standard error of the mean; NaN for fewer than two values."""
    if len(values) < 2:
        return math.nan
    mean = sum(values) / len(values)
    return math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1) / len(values))
