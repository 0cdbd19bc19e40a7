"""Several generations over one packed model: each as if alone, each weight expanded once."""

import threading

import pytest
import torch

import endor
from endor.errors import DependencyError, FormatError
from endor.serving.lockstep import Draws, Lockstep

from ..support.tiny_talker import pack_talker

PROMPTS = ([3, 4], [9, 7, 5], [11], [1, 2, 3, 4, 5, 6])


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    return pack_talker(tmp_path_factory.mktemp("lockstep"))


@pytest.fixture
def model(packed):
    return endor.load_model(packed)


def generate(model, prompt, **options):
    ids = torch.tensor([prompt])
    options = {"max_new_tokens": 8, "do_sample": False} | options
    return model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        return_dict_in_generate=True,
        output_logits=True,
        pad_token_id=0,
        **options,
    )


def together(model, jobs):
    """Run functions as members of one lockstep; return what each returned or raised."""
    lockstep, found = Lockstep(model, len(jobs)), [None] * len(jobs)
    ready = threading.Barrier(len(jobs))

    def work(at, job):
        ready.wait()
        try:
            with lockstep.member():
                found[at] = job()
        except Exception as error:
            found[at] = error

    threads = [threading.Thread(target=work, args=pair) for pair in enumerate(jobs)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
        assert not thread.is_alive(), "two wait for each other"
    return found


def bits(outcome):
    return torch.stack(outcome.logits).view(torch.int32)


def test_each_gets_the_bits_that_it_gets_alone(packed, model):
    alone = [generate(endor.load_model(packed), prompt) for prompt in PROMPTS]
    found = together(model, [lambda p=prompt: generate(model, p) for prompt in PROMPTS])
    for one, other in zip(alone, found, strict=True):
        assert torch.equal(one.sequences, other.sequences)
        assert torch.equal(bits(one), bits(other))


def test_a_weight_is_expanded_once_for_all(packed, model):
    before = model.endor.ledger.counters.expands
    generate(model, PROMPTS[0])
    alone = model.endor.ledger.counters.expands - before
    assert alone
    before = model.endor.ledger.counters.expands
    together(model, [lambda p=prompt: generate(model, p) for prompt in PROMPTS])
    # at most a step more, for those who came when the others had begun
    assert model.endor.ledger.counters.expands - before <= alone * 1.5


def test_fast_products_take_the_rows_of_all(packed):
    model = endor.load_model(packed, exact=False)
    alone = [generate(model, prompt) for prompt in PROMPTS]
    before = model.endor.ledger.counters.products
    generate(model, PROMPTS[0], max_new_tokens=20)
    once = model.endor.ledger.counters.products - before
    before = model.endor.ledger.counters.products
    jobs = [lambda p=prompt: generate(model, p, max_new_tokens=20) for prompt in PROMPTS]
    found = together(model, jobs)
    assert model.endor.ledger.counters.products - before <= once * 1.5
    for one, other in zip(alone, found, strict=True):
        torch.testing.assert_close(
            one.logits[0].float(), other.logits[0].float(), atol=0.05, rtol=0.05
        )


def test_lengths_and_samplings_of_their_own(packed, model):
    options = (
        {"max_new_tokens": 3},
        {"max_new_tokens": 12, "repetition_penalty": 1.3},
        {"max_new_tokens": 7, "num_beams": 2},
        {"max_new_tokens": 5, "do_sample": True, "top_k": 1},
    )
    other = endor.load_model(packed)
    alone = [generate(other, *pair[:1], **pair[1]) for pair in zip(PROMPTS, options, strict=True)]
    jobs = [
        lambda p=prompt, o=option: generate(model, p, **o)
        for prompt, option in zip(PROMPTS, options, strict=True)
    ]
    for one, found in zip(alone, together(model, jobs), strict=True):
        assert torch.equal(one.sequences, found.sequences)


def test_one_that_fails_leaves_the_others_alone(packed, model):
    class Broken(Exception):
        pass

    def stop(input_ids, scores, **options):
        raise Broken

    def fails():
        return generate(model, PROMPTS[1], stopping_criteria=[stop])

    jobs = [lambda: generate(model, PROMPTS[0]), fails, lambda: generate(model, PROMPTS[2])]
    first, second, third = together(model, jobs)
    assert isinstance(second, Broken)
    alone = endor.load_model(packed)
    assert torch.equal(first.sequences, generate(alone, PROMPTS[0]).sequences)
    assert torch.equal(third.sequences, generate(alone, PROMPTS[2]).sequences)


def test_a_layer_that_fails_fails_for_those_who_wait_there(model):
    def broken(*args, **kwargs):
        raise FormatError("damaged")

    lockstep = Lockstep(model, 2)
    layer = model.model.layers[1].mlp.up_proj
    lockstep._forwards[layer] = broken
    with pytest.raises(FormatError, match="damaged"), lockstep.member():
        generate(model, PROMPTS[0])
    with pytest.raises(FormatError, match="damaged"), lockstep.member():
        generate(model, PROMPTS[0])  # the first one does not keep its place


def test_a_seed_gives_the_same_words_whoever_else_draws(model):
    lockstep = Lockstep(model, 3)
    cpu = torch.device("cpu")

    def drawn(seed, prompt, out):
        with lockstep.member(None if seed is None else Draws(seed, cpu)):
            out.append(
                generate(model, prompt, do_sample=True, max_new_tokens=20).sequences.tolist()
            )

    runs = []
    for others in (0, 2):
        found = []
        threads = [threading.Thread(target=drawn, args=(7, PROMPTS[0], found))]
        threads += [
            threading.Thread(target=drawn, args=(None, PROMPTS[1], [])) for _ in range(others)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
        runs.append(found)
    assert runs[0] == runs[1]
    other = []
    drawn(8, PROMPTS[0], other)
    assert other != runs[0]


def test_the_process_draws_on_where_it_was(model):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    with Lockstep(model, 2).member(Draws(1, torch.device("cpu"))):
        generate(model, PROMPTS[0], do_sample=True)
    assert torch.equal(torch.rand(3), expected)


def test_a_generation_that_does_not_call_the_model_is_noticed(model):
    with (
        pytest.raises(DependencyError, match="without calling it"),
        Lockstep(model, 2).member(),
    ):
        model.forward(torch.tensor([[1]]))
