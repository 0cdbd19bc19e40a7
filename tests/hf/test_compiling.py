"""What people do with a loaded model: compile it, export it, batch it, attend flexibly."""

import pytest
import torch
from transformers import GenerationConfig

import endor
from endor.errors import ConfigError

from .conftest import least, prompt

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("kind", ["llama", "mixtral"])
@pytest.mark.parametrize("tier", ["resident", "streamed"])
def test_torch_compile(make_pair, kind, tier):
    """Graphs between packed layers; the graphs' own arithmetic is torch's, here unchanged."""
    pair = make_pair(kind)
    model = endor.load_model(pair.packed)
    if tier == "streamed":
        model = endor.load_model(pair.packed, ram=least(model))
    compiled = torch.compile(model, backend="eager")
    for length in (11, 7):
        ids = prompt(length=length)
        with torch.no_grad():
            found = compiled(ids).logits
        assert torch.equal(found, pair.logits(pair.dense, ids))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 1


def test_torch_compile_trains_what_is_not_packed(pair):
    model = endor.load_model(pair.packed)
    grads = []
    for run in (model, torch.compile(model, backend="eager")):
        model.zero_grad()
        run(prompt(), labels=prompt()).loss.backward()
        grads.append(model.get_input_embeddings().weight.grad.clone())
    assert torch.equal(*grads)


def test_one_whole_graph_is_refused_with_the_reason(pair):
    model = torch.compile(endor.load_model(pair.packed), backend="eager", fullgraph=True)
    with pytest.raises(Exception, match="packed weights are expanded between graphs"):
        model(prompt())


@pytest.mark.parametrize("kind", ["llama", "mixtral"])
def test_torch_export_is_refused(make_pair, kind):
    model = endor.load_model(make_pair(kind).packed)
    with pytest.raises(ConfigError, match=r"cannot be exported.*endor unpack"):
        torch.export.export(model, (prompt(),), {"use_cache": False})
    assert torch.equal(make_pair(kind).logits(model), make_pair(kind).logits(make_pair(kind).dense))


@pytest.mark.slow
def test_flex_attention(pair):
    """Compiled by transformers; the dense model's bits."""
    dense = type(pair.dense).from_pretrained(pair.dense_dir, attn_implementation="flex_attention")
    for parameter in dense.parameters():
        parameter.data = parameter.data.clone()
    model = endor.load_model(pair.packed, attn_implementation="flex_attention")
    assert torch.equal(pair.logits(model), pair.logits(dense))


@pytest.mark.slow
def test_continuous_batching(pair):
    """`generate_batch`: requests that come and go; the dense model's tokens."""
    config = GenerationConfig(
        max_new_tokens=4,
        do_sample=False,
        eos_token_id=-1,
        num_blocks=16,
        block_size=8,
        max_batch_tokens=64,
    )
    requests = [prompt()[0].tolist(), prompt(length=5)[1].tolist()]
    tokens = []
    streamed = endor.load_model(pair.packed, ram=least(endor.load_model(pair.packed)))
    for model in (pair.dense, endor.load_model(pair.packed), streamed):
        found = model.generate_batch(inputs=requests, generation_config=config)
        tokens.append([found[name].generated_tokens for name in sorted(found)])
    assert [len(each) for each in tokens[0]] == [4, 4]
    assert tokens[1] == tokens[0]
    assert tokens[2] == tokens[0]
