import math
from types import SimpleNamespace

import pytest
import torch

from endor.bench.quality.perplexity import (
    EvalTokens,
    Window,
    agreement,
    perplexity,
    tokenize,
    windows,
)
from endor.errors import ConfigError, ShapeError

VOCABULARY = 37


class Bigram:
    """A causal model whose logits depend on the last token and on how many came before it."""

    device = torch.device("cpu")

    def __init__(self, seed: int, vocabulary: int = VOCABULARY) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.table = torch.randn(vocabulary, vocabulary, generator=generator)
        self.calls = 0

    def __call__(self, *, input_ids: torch.Tensor, use_cache: bool) -> SimpleNamespace:
        assert not use_cache
        self.calls += 1
        places = torch.arange(input_ids.shape[1], dtype=torch.float32).reshape(1, -1, 1)
        return SimpleNamespace(logits=self.table[input_ids] * (1 + 0.01 * places))


@pytest.fixture
def tokens() -> EvalTokens:
    generator = torch.Generator().manual_seed(7)
    ids = torch.randint(VOCABULARY, (103,), generator=generator)
    return EvalTokens(ids, tuple(3 * (place + 1) for place in range(103)))


def hugging_face_recipe(model: Bigram, ids: torch.Tensor, window: int, stride: int) -> float:
    """The documentation's loop, with the tokens counted instead of estimated."""
    total, count, previous_end = 0.0, 0, 0
    for begin in range(0, len(ids), stride):
        end = min(begin + window, len(ids))
        part = ids[begin:end].unsqueeze(0)
        labels = part.clone()
        labels[:, : -(end - previous_end)] = -100
        logits = model(input_ids=part, use_cache=False).logits.double()
        total += float(
            torch.nn.functional.cross_entropy(
                logits[0, :-1], labels[0, 1:], ignore_index=-100, reduction="sum"
            )
        )
        count += int((labels[0, 1:] != -100).sum())
        previous_end = end
        if end == len(ids):
            break
    return math.exp(total / count)


@pytest.mark.parametrize(("window", "stride"), [(32, 8), (32, 31), (200, 5), (2, 1)])
def test_strided_windows_follow_the_hugging_face_recipe(tokens, window, stride):
    found = perplexity(Bigram(0), tokens, window=window, stride=stride)

    assert found.perplexity == pytest.approx(
        hugging_face_recipe(Bigram(0), tokens.ids, window, stride), rel=1e-6
    )
    assert found.tokens == 102


def test_disjoint_windows_drop_the_tail_and_score_all_but_each_first_token(tokens):
    found = perplexity(Bigram(0), tokens, window=25)

    rows = tokens.ids[:100].reshape(4, 25)
    logits = Bigram(0)(input_ids=rows, use_cache=False).logits.double()
    nll = torch.nn.functional.cross_entropy(
        logits[:, :-1].reshape(-1, VOCABULARY), rows[:, 1:].reshape(-1)
    )
    assert (found.windows, found.tokens, found.stride) == (4, 96, 25)
    assert found.nll == pytest.approx(float(nll), rel=1e-6)
    assert found.nll == pytest.approx(sum(found.window_nll) / 4)


def test_windows_are_what_the_conventions_say():
    assert windows(10, window=4) == [Window(0, 4, 1), Window(4, 8, 5)]
    assert windows(10, window=4, stride=3) == [Window(0, 4, 1), Window(3, 7, 4), Window(6, 10, 7)]
    assert windows(9, window=4, stride=3) == [Window(0, 4, 1), Window(3, 7, 4), Window(6, 9, 7)]
    assert windows(3, window=512) == [Window(0, 3, 1)]
    assert windows(100, window=10, max_windows=2) == windows(20, window=10)


def test_every_token_is_scored_at_most_once_and_in_order():
    for stride in range(1, 8):
        scored = [
            place
            for item in windows(40, window=7, stride=stride)
            for place in range(item.target_begin, item.end)
        ]
        assert scored == sorted(set(scored))


def test_bits_per_byte_divide_by_the_bytes_of_the_scored_tokens(tokens):
    found = perplexity(Bigram(0), tokens, window=25)

    assert found.bits_per_byte == pytest.approx(found.nll / math.log(2) / 3)
    assert perplexity(Bigram(0), EvalTokens(tokens.ids), window=25).bits_per_byte is None


def test_bos_conditions_but_is_not_scored(tokens):
    plain = perplexity(Bigram(0), tokens, window=25)
    with_bos = perplexity(Bigram(0), EvalTokens(tokens.ids, tokens.byte_ends, bos=1), window=25)

    assert with_bos.tokens == plain.tokens
    assert with_bos.bos
    assert with_bos.nll != plain.nll


def test_a_model_agrees_with_itself_exactly(tokens):
    found = agreement(Bigram(0), Bigram(0), tokens, window=25)

    assert (found.kl, found.top1, found.nll_difference) == (0.0, 1.0, 0.0)
    assert found.model.window_nll == perplexity(Bigram(0), tokens, window=25).window_nll


def test_agreement_matches_torch_kl_div(tokens):
    found = agreement(Bigram(0), Bigram(1), tokens, window=103)

    ids = tokens.ids.unsqueeze(0)
    mine = Bigram(0)(input_ids=ids, use_cache=False).logits[0, :-1].log_softmax(1)
    theirs = Bigram(1)(input_ids=ids, use_cache=False).logits[0, :-1].log_softmax(1)
    expected = torch.nn.functional.kl_div(mine, theirs, reduction="batchmean", log_target=True)
    assert found.kl == pytest.approx(float(expected), rel=1e-5)
    assert found.top1 == pytest.approx(float((mine.argmax(1) == theirs.argmax(1)).float().mean()))
    assert found.nll_difference == pytest.approx(found.model.nll - found.reference.nll)
    assert math.isnan(found.kl_stderr)


def test_a_token_the_reference_forbids_adds_nothing(tokens):
    reference, model = Bigram(0), Bigram(0)
    forbidden = next(t for t in range(VOCABULARY) if t not in tokens.ids[:3].tolist())
    reference.table[:, forbidden] = -math.inf
    model.table[:, forbidden] = -math.inf

    assert agreement(model, reference, EvalTokens(tokens.ids[:3]), window=3).kl == 0.0


def test_progress_counts_windows(tokens):
    seen = []
    perplexity(
        Bigram(0), tokens, window=25, max_windows=3, progress=lambda *pair: seen.append(pair)
    )
    assert seen == [(1, 3), (2, 3), (3, 3)]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"window": 1}, ConfigError, "window must be at least 2"),
        ({"window": 8, "stride": 0}, ConfigError, "stride must lie in 1..window"),
        ({"window": 8, "stride": 9}, ConfigError, "stride must lie in 1..window"),
        ({"window": 8, "max_windows": 0}, ConfigError, "max_windows must be at least 1"),
    ],
)
def test_wrong_options_are_refused(options, error, message):
    with pytest.raises(error, match=message):
        windows(100, **options)


def test_a_text_of_one_token_is_refused():
    with pytest.raises(ShapeError, match="at least 2 tokens"):
        windows(1, window=8)


def test_vocabularies_of_different_size_are_refused(tokens):
    with pytest.raises(ShapeError, match="one vocabulary"):
        agreement(Bigram(0), Bigram(0, VOCABULARY + 1), tokens, window=25)


class WordTokenizer:
    """Splits at spaces; like a fast tokenizer, it reports character offsets."""

    is_fast = True

    def __init__(self, *, bos_token_id: int | None, adds_bos: bool) -> None:
        self.bos_token_id = bos_token_id
        self.adds_bos = adds_bos

    def __call__(self, text, *, add_special_tokens=True, return_offsets_mapping=False, **_):
        offsets, place = [], 0
        for word in text.split(" "):
            offsets.append((place, place + len(word)))
            place += len(word) + 1
        ids = list(range(5, 5 + len(offsets)))
        if add_special_tokens and self.adds_bos:
            ids.insert(0, self.bos_token_id)
        return Encoding(input_ids=ids, offset_mapping=offsets)


class Encoding(dict):
    @property
    def input_ids(self):
        return self["input_ids"]


def test_tokenize_counts_utf8_bytes():
    tokens = tokenize("né à Bath", WordTokenizer(bos_token_id=1, adds_bos=False))

    assert tokens.ids.tolist() == [5, 6, 7]
    assert tokens.byte_ends == (3, 6, 11)
    assert tokens.bos is None


def test_tokenize_takes_the_tokenizers_own_habit_of_bos():
    assert tokenize("a b", WordTokenizer(bos_token_id=1, adds_bos=True)).bos == 1
    assert tokenize("a b", WordTokenizer(bos_token_id=1, adds_bos=True), bos=False).bos is None
    assert tokenize("a b", WordTokenizer(bos_token_id=1, adds_bos=False), bos=True).bos == 1
    with pytest.raises(ConfigError, match="beginning-of-sequence"):
        tokenize("a b", WordTokenizer(bos_token_id=None, adds_bos=False), bos=True)
