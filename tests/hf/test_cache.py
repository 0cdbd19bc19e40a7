"""Keys and values outside the model: the tensors, and the text, of transformers' own cache."""

import copy
import random
import re

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import DynamicCache
from transformers.generation import GenerationMixin

import endor
from endor.errors import BudgetError, ConfigError, DependencyError, ShapeError
from endor.hf.cache import EndorCache, EndorCacheLayer
from endor.hf.generation_cache import CACHE_ARGUMENT as CACHE
from endor.hf.generation_cache import keep_kv, new_cache
from endor.offload.kv.media import FileAccess
from endor.offload.kv.store import KVStore

from ..support.fake_device import FakeDevice
from .conftest import config_of, least, prompt

LAYERS = 3


class Clock(FakeDevice):
    """A simulated device on which computing waits for the clock when it waits for an event."""

    def await_in_compute(self, event):
        super().await_in_compute(event)
        self.synchronize(event)


@pytest.fixture(scope="module")
def config():
    return config_of("llama")


def states(batch, tokens, seed, dtype=torch.bfloat16):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn((2, batch, 2, tokens, 16), generator=generator).to(dtype)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.differing_executors])
@given(
    seed=st.integers(0, 1 << 30),
    limit=st.sampled_from([None, 0, 300_000]),
    simulated=st.booleans(),
    dtype=st.sampled_from([torch.bfloat16, torch.float32]),
)
def test_every_operation_is_that_of_the_dynamic_cache(
    tmp_path_factory, config, seed, limit, simulated, dtype
):
    device = Clock() if simulated else None
    access = FileAccess(tmp_path_factory.getbasetemp())
    store = KVStore(LAYERS, device=device, ram_bytes=limit, access=access)
    ours, theirs = EndorCache(config, store), DynamicCache(config=config)
    order = random.Random(seed)
    batch = 3
    for step in range(25):
        for layer in range(LAYERS):
            keys, values = states(batch, 1 + 3 * (step == 0), seed + 31 * step + layer, dtype)
            expected = theirs.update(keys, values, layer)
            found = ours.update(keys, values, layer)
            for one, other in zip(found, expected, strict=True):
                assert torch.equal(one, other)
                assert one.is_contiguous()
        action = order.random()
        if action < 0.3:
            beams = torch.tensor([order.randrange(batch) for _ in range(batch)])
            for cache in (ours, theirs):
                cache.reorder_cache(beams)
        elif action < 0.5:
            remove = order.randrange(min(4, theirs.get_seq_length()))
            for cache in (ours, theirs):
                cache.crop(-remove)
        elif action < 0.57 and batch < 6:
            batch *= 2
            for cache in (ours, theirs):
                cache.batch_repeat_interleave(2)
        elif action < 0.64 and batch > 1:
            kept = torch.tensor(sorted(order.sample(range(batch), batch - 1)))
            batch -= 1
            for cache in (ours, theirs):
                cache.batch_select_indices(kept)
        assert ours.get_seq_length() == theirs.get_seq_length()
        assert ours.get_mask_sizes(5, 0) == theirs.get_mask_sizes(5, 0)
    for one, other in zip(ours.layers, theirs.layers, strict=True):
        assert torch.equal(one.keys, other.keys)
        assert torch.equal(one.values, other.values)
    copied = copy.deepcopy(ours)
    assert all(
        torch.equal(one.keys, other.keys)
        for one, other in zip(copied.layers, theirs.layers, strict=True)
    )
    ours.reset()
    assert ours.get_seq_length() == 0
    assert ours.layers[0].keys is None
    if device is not None:
        assert device.errors == []
    store.close()


@pytest.fixture(params=[0, None, 300_000], ids=["disk", "ram", "spill"])
def model(request, pair, tmp_path):
    """A streamed model whose `generate` keeps keys and values outside."""
    model = endor.load_model(pair.packed, ram=least(endor.load_model(pair.packed)))
    keep_kv(
        model,
        "disk" if request.param == 0 else "ram",
        ram_bytes=request.param,
        directory=tmp_path,
    )
    model.kv_limit = request.param
    return model


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_beams": 3},
        {"num_beams": 4, "num_return_sequences": 2},
        {"prompt_lookup_num_tokens": 3},
        {"do_sample": True, "temperature": 1.3},
        {"prefill_chunk_size": 4},
    ],
    ids=lambda options: "-".join(options) or "greedy",
)
def test_generate_gives_the_dense_models_tokens(pair, model, options):
    ids = prompt(1 if "prompt_lookup_num_tokens" in options else 3)
    arguments = {"max_new_tokens": 12, "do_sample": False} | options
    texts = []
    for each in (pair.dense, model):
        torch.manual_seed(5)
        texts.append(each.generate(ids, **arguments))
    assert torch.equal(*texts)
    counters = model.endor.ledger.counters
    assert (counters.kv_loads > 0) == (model.kv_limit is not None)


def test_assisted_decoding(pair, model):
    ids = prompt(1)
    expected = pair.dense.generate(ids, max_new_tokens=12, do_sample=False)
    for main, assistant in ((model, pair.dense), (pair.dense, model)):
        found = main.generate(ids, max_new_tokens=12, do_sample=False, assistant_model=assistant)
        assert torch.equal(found, expected)


def test_a_cache_can_be_continued(pair, model):
    """A conversation: the cache of the first answer serves the second question."""
    ids = prompt(2)
    caches = [new_cache(model, ram_bytes=model.kv_limit), DynamicCache(config=pair.dense.config)]
    for turn in range(2):
        texts = [
            each.generate(ids, max_new_tokens=5, do_sample=False, **{CACHE: cache})
            for each, cache in zip((model, pair.dense), caches, strict=True)
        ]
        assert torch.equal(*texts)
        ids = torch.cat([texts[0], prompt(2, 3 + turn)], dim=1)


def test_other_caches_are_left_alone(model):
    ids = prompt(1)
    for options in ({"cache_implementation": "static"}, {"use_cache": False}):
        model.generate(ids, max_new_tokens=3, do_sample=False, **options)
    mine = DynamicCache(config=model.config)
    out = model.generate(
        ids, max_new_tokens=3, do_sample=False, return_dict_in_generate=True, **{CACHE: mine}
    )
    assert getattr(out, CACHE) is mine
    out = model.generate(ids, max_new_tokens=3, do_sample=False, return_dict_in_generate=True)
    assert isinstance(getattr(out, CACHE), EndorCache)


def test_layers_with_a_window_stay_transformers_own(make_pair, tmp_path):
    pair = make_pair("gemma2", sliding_window=8)
    model = endor.load_model(pair.packed)
    keep_kv(model, "disk", directory=tmp_path)
    ids = prompt(2)
    out = model.generate(ids, max_new_tokens=8, do_sample=False, return_dict_in_generate=True)
    assert torch.equal(out.sequences, pair.dense.generate(ids, max_new_tokens=8, do_sample=False))
    kinds = [isinstance(layer, EndorCacheLayer) for layer in getattr(out, CACHE).layers]
    assert any(kinds)
    assert not all(kinds)


def test_what_cannot_be_kept_outside(pair, config, tmp_path):
    cache = EndorCache(config, KVStore(LAYERS, ram_bytes=0, access=FileAccess(tmp_path)))
    keys, values = states(2, 1, 0)
    with pytest.raises(ConfigError, match="one dtype"):
        cache.update(keys, values.float(), 0)
    cache.update(keys, values, 0)
    with pytest.raises(ShapeError, match="reset the cache first"):
        cache.update(*states(3, 1, 0), 0)
    with pytest.raises(ConfigError, match="gradients"):
        cache.update(keys.requires_grad_(), values, 1)
    with pytest.raises(ConfigError, match="minus the number"):
        cache.crop(2)
    with pytest.raises(ConfigError, match="got 'tape'"):
        keep_kv(endor.load_model(pair.packed), "tape")


def test_the_planned_context_decides(make_pair):
    """Keys and values of a context that does not fit the budget go to disk."""
    pair, context = make_pair("llama", num_hidden_layers=8), 4096
    with pytest.raises(BudgetError) as refused:
        endor.load_model(pair.packed, ram=1 << 16, context=context, kv="device")
    least = int(re.search(r"\((\d+) bytes\)", str(refused.value))[1])
    assert endor.load_model(pair.packed, ram=least, context=context).endor_plan.workload.kv == (
        "device"
    )
    model = endor.load_model(pair.packed, ram=least - 1, context=context)
    assert model.endor_plan.workload.kv == "disk"
    ids = prompt(2)
    expected = pair.dense.generate(ids, max_new_tokens=6, do_sample=False)
    assert torch.equal(model.generate(ids, max_new_tokens=6, do_sample=False), expected)
    assert model.endor.ledger.counters.kv_loads > 0
    with pytest.raises(ConfigError, match="got 'tape'"):
        endor.load_model(pair.packed, kv="tape")


def rename_the_argument(monkeypatch, model, new):
    """Have transformers make its cache under another name, as 5.24 did."""
    real = type(model)._prepare_cache_for_generation

    def renamed(self, generation_config, model_kwargs, *args):
        out = real(self, generation_config, model_kwargs, *args)
        new(model_kwargs)
        return out

    monkeypatch.setattr(type(model), "_prepare_cache_for_generation", renamed)


def test_the_cache_is_known_whatever_its_name(monkeypatch, pair):
    model = endor.load_model(pair.packed, kv="disk")
    seen = []

    def name_it(kwargs):
        kwargs["memory"] = kwargs.pop(CACHE)

    rename_the_argument(monkeypatch, model, name_it)
    monkeypatch.setattr(
        type(model), "_sample", lambda self, *args, **kwargs: seen.append(kwargs["memory"])
    )
    model.generate(prompt(1), max_new_tokens=3, do_sample=False)
    assert [type(cache) for cache in seen] == [EndorCache]


@pytest.mark.parametrize("made", ["none", "another"])
def test_a_cache_that_was_not_placed_raises(monkeypatch, pair, made):
    model = endor.load_model(pair.packed, kv="disk")

    class Another(DynamicCache):
        pass

    def spoil(kwargs):
        del kwargs[CACHE]
        if made == "another":
            kwargs[CACHE] = Another()

    rename_the_argument(monkeypatch, model, spoil)
    with pytest.raises(DependencyError, match=r"transformers [0-9.]+: for kv='disk', generate"):
        model.generate(prompt(1), max_new_tokens=3, do_sample=False)


def test_a_generate_without_the_hook_raises(monkeypatch, pair):
    model = endor.load_model(pair.packed)
    monkeypatch.setattr(GenerationMixin, "generate", lambda self, *args, **kwargs: None)
    with pytest.raises(DependencyError, match="generate does not call"):
        keep_kv(model, "disk")


def test_models_whose_cache_cannot_be_elsewhere(make_pair, tmp_path):
    """Said when it is asked for; not planned with when it is not."""
    pair = make_pair("mistral", sliding_window=8)
    with pytest.raises(ConfigError, match=r"kv='disk': .* no layer that keeps all tokens"):
        endor.load_model(pair.packed, kv="disk")
    model = endor.load_model(pair.packed)
    assert model.endor_plan.workload.kv == "device"
    found = model.generate(prompt(1), max_new_tokens=9, do_sample=False)
    assert torch.equal(found, pair.dense.generate(prompt(1), max_new_tokens=9, do_sample=False))
