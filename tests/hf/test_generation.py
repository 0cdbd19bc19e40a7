"""Generated text is the dense model's, comes piece by piece, and its cost is counted."""

import pytest
import torch

import endor
from endor.errors import CheckpointError, ConfigError
from endor.hf.generation import Sampling, encode_prompt, generate_text
from endor.trust import read_tokenizer

from .conftest import least


def test_text_and_figures(pair, tokenizer):
    first = endor.load_model(pair.packed)
    model = endor.load_model(pair.packed, ram=least(first))
    inputs = encode_prompt(tokenizer, "w3 w4 w5")
    pieces = []
    result = generate_text(model, tokenizer, inputs, Sampling(9), show=pieces.append)
    dense = generate_text(pair.dense, tokenizer, inputs, Sampling(9))
    assert result.text == dense.text
    assert "".join(pieces).strip() == result.text.strip()
    assert len(pieces) > 2
    assert (result.prompt_tokens, result.new_tokens) == (3, 9)
    assert result.disk_bytes >= 8 * model.endor.packed_nbytes
    assert result.packed_bytes > 0
    assert (dense.disk_bytes, dense.packed_bytes) == (0, 0)
    assert result.began_s < result.ended_s
    assert result.prefill_tokens_per_s > 0
    assert result.decode_tokens_per_s > 0


def test_sampling_is_repeatable(pair, tokenizer):
    inputs = encode_prompt(tokenizer, "w3 w4 w5")
    sampling = Sampling(12, temperature=1.5, top_p=0.95, seed=3)
    texts = {generate_text(pair.dense, tokenizer, inputs, sampling).text for _ in range(2)}
    model = endor.load_model(pair.packed)
    texts.add(generate_text(model, tokenizer, inputs, sampling).text)
    assert len(texts) == 1
    torch.manual_seed(0)
    other = generate_text(model, tokenizer, inputs, Sampling(12, temperature=1.5, seed=4))
    assert other.text not in texts


@pytest.mark.parametrize(
    ("sampling", "problem"),
    [
        (Sampling(0), "max_new_tokens"),
        (Sampling(temperature=-1), "temperature"),
        (Sampling(top_p=0), "top_p"),
        (Sampling(top_p=1.1), "top_p"),
    ],
)
def test_senseless_sampling(pair, tokenizer, sampling, problem):
    with pytest.raises(ConfigError, match=problem):
        generate_text(pair.dense, tokenizer, encode_prompt(tokenizer, "w3"), sampling)


def test_prompts(tokenizer, pair):
    with pytest.raises(ConfigError, match="chat template"):
        encode_prompt(tokenizer, "w3", chat=True)
    tokenizer.chat_template = "{% for m in messages %}w9 {{ m['content'] }} w8{% endfor %}"
    assert encode_prompt(tokenizer, "w3", chat=True)["input_ids"].shape == (1, 3)
    with pytest.raises(ConfigError, match="at least one token"):
        encode_prompt(tokenizer, "")
    with pytest.raises(CheckpointError, match="tokenizer"):
        read_tokenizer(pair.packed)
