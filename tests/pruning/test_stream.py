"""Layer by layer must be what the whole model does; every selected tensor comes out pruned."""

import json
from contextlib import closing

import numpy as np
import pytest
import torch

from endor import machine
from endor.checkpoint import open_source
from endor.checkpoint.plan import plan_units
from endor.checkpoint.select import select
from endor.errors import ConfigError, PruningError
from endor.packed import tensor_of
from endor.pruning import PruneOptions
from endor.pruning.skeleton import Skeleton
from endor.pruning.source import PrunedSource

DENSE = ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "opt", "phi3", "gpt_neox"]
DENSE += ["gpt2"]
MIXTURES = ["mixtral", "qwen3_moe", "gpt_oss", "llama4", "jetmoe"]
CPU = torch.device("cpu")


def read(source, name):
    tensor = source.tensors[name]
    raw = np.empty(tensor.nbytes, dtype=np.uint8)
    source.read_into(name, raw)
    return tensor_of(raw.view(tensor.dtype.uint).reshape(tensor.shape), tensor.dtype)


def run(directory, options, selected=None, **named):
    """Return all pruned tensors in the order of a conversion, and the description."""
    with closing(open_source(directory)) as source:
        chosen = select(source.tensors.values()) if selected is None else selected
        with closing(PrunedSource(source, options, chosen, **named)) as pruned:
            units = plan_units(source.tensors.values(), chosen)
            names = [tensor.name for unit in units for tensor in unit.tensors]
            return {name: read(pruned, name).clone() for name in names}, chosen


def small(text, **fields):
    return PruneOptions(calibration=(text,), samples=20, seq_len=32, **fields)


@pytest.mark.parametrize("architecture", DENSE + MIXTURES)
def test_streamed_layers_are_the_model(architecture, tmp_path, save):
    model = save(tmp_path, architecture)
    ids = torch.randint(3, 250, (3, 32), generator=torch.Generator().manual_seed(0))
    seen = []
    with closing(open_source(tmp_path)) as source, torch.no_grad():
        skeleton = Skeleton(source, CPU)
        calls = skeleton.trace(ids, 2, lambda start, hidden: seen.append((start, hidden)))
        assert [start for start, _ in seen] == [0, 2]
        hidden = torch.cat([part for _, part in seen])
        for index, call in enumerate(calls):
            hidden = call.run(skeleton.load_layer(index), hidden)
            skeleton.drop_layer(index)
        if hasattr(model, "set_experts_implementation"):
            model.set_experts_implementation("eager")
        last = []
        layers = dict(model.named_modules())[skeleton._prefix]
        layers[-1].register_forward_hook(lambda _module, _args, out: last.append(out))
        model(input_ids=ids, use_cache=False)
    wanted = last[0][0] if isinstance(last[0], tuple) else last[0]
    torch.testing.assert_close(hidden, wanted, rtol=1e-5, atol=1e-5)
    assert all(parameter.is_meta for parameter in skeleton.layers.parameters())


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "opt", "gpt2", "mixtral"])
def test_what_follows_the_layers_gives_the_models_logits(architecture, tmp_path, save):
    model = save(tmp_path, architecture)
    ids = torch.randint(3, 250, (2, 32), generator=torch.Generator().manual_seed(0))
    seen = []
    with closing(open_source(tmp_path)) as source, torch.no_grad():
        skeleton = Skeleton(source, CPU)
        calls = skeleton.trace(ids, 2, lambda start, hidden: seen.append(hidden))
        hidden = seen[0]
        for index, call in enumerate(calls):
            hidden = call.run(skeleton.load_layer(index), hidden)
            skeleton.drop_layer(index)
        with skeleton.head() as logits:
            found = logits(ids, hidden)
        wanted = model(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    assert all(parameter.is_meta for parameter in skeleton.layers.parameters())


@pytest.mark.parametrize("method", ["wanda", "admm"])
@pytest.mark.parametrize("architecture", DENSE + MIXTURES)
def test_every_selected_tensor_is_pruned_and_no_other(architecture, method, tmp_path, save, text):
    save(tmp_path, architecture, torch.bfloat16)
    tensors, selected = run(tmp_path, small(text, method=method, sparsity=0.5))
    assert len(selected) >= 3 * 4
    with closing(open_source(tmp_path)) as source:
        for name, tensor in tensors.items():
            dense = read(source, name)
            assert tensor.dtype == dense.dtype
            if name in selected:
                zeros = int((tensor == 0).sum())
                assert zeros == int(dense.numel() * 0.5 + 0.5), name
                assert bool(torch.isfinite(tensor).all())
                assert not bool((torch.signbit(tensor) & (tensor == 0)).any()), name
            else:
                assert torch.equal(tensor, dense), name


def test_later_layers_see_earlier_pruning(tmp_path, save, text):
    save(tmp_path, "llama")
    both, _ = run(tmp_path, small(text, method="sparsegpt", sparsity=0.7))
    last = frozenset(name for name in both if ".layers.2." in name and "proj" in name)
    alone, _ = run(tmp_path, small(text, method="sparsegpt", sparsity=0.7), last)
    name = "model.layers.2.mlp.down_proj.weight"
    assert not torch.equal(both[name], alone[name])


def test_sequential_differs_only_behind_the_first_matrices(tmp_path, save, text):
    save(tmp_path, "llama")
    one = small(text, method="sparsegpt", sparsity=0.7)
    two = small(text, method="sparsegpt", sparsity=0.7, sequential=False)
    (first, _), (second, _) = run(tmp_path, one), run(tmp_path, two)
    query = "model.layers.0.self_attn.q_proj.weight"
    down = "model.layers.0.mlp.down_proj.weight"
    assert torch.equal(first[query], second[query])
    assert not torch.equal(first[down], second[down])


def test_same_seed_same_bits_and_spilling_changes_nothing(tmp_path, save, text):
    save(tmp_path, "mixtral", torch.bfloat16)
    first, _ = run(tmp_path, small(text, method="auto"))
    second, _ = run(tmp_path, small(text, method="auto", memory_bytes=0))
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name


@pytest.mark.parametrize("rates", [(1.0, 9.0), (9.0, 1.0)])
def test_re_training_computes_in_the_type_that_is_fast_here(
    rates, tmp_path, save, text, monkeypatch
):
    save(tmp_path, "llama")
    monkeypatch.setattr(machine, "arithmetic", lambda: machine.Arithmetic(*rates))
    seen = set()
    linear = torch.nn.functional.linear

    def watched(*args):
        out = linear(*args)
        seen.add(out.dtype)
        return out

    monkeypatch.setattr(torch.nn.functional, "linear", watched)
    run(tmp_path, small(text, method="auto"))
    narrow = torch.bfloat16 in seen
    assert narrow == (rates[0] > rates[1])


def test_passes_train_the_survivors_of_auto_alone(tmp_path, save, text):
    save(tmp_path, "llama")
    once, _ = run(tmp_path, small(text, method="auto", passes=1))
    often, _ = run(tmp_path, small(text, method="auto", passes=3))
    assert any(not torch.equal(once[name], often[name]) for name in once)
    once, _ = run(tmp_path, small(text, method="admm", passes=1))
    often, _ = run(tmp_path, small(text, method="admm", passes=3))
    assert all(torch.equal(once[name], often[name]) for name in once)
    with pytest.raises(ConfigError, match="passes: must be at least 1, got 0"):
        small(text, method="auto", passes=0)


def test_a_second_run_goes_on_from_the_finished_layers(tmp_path, save, text):
    save(tmp_path / "model", "llama", torch.bfloat16)
    options = small(text, method="auto", scratch=tmp_path / "scratch")
    whole, selected = run(tmp_path / "model", options)
    (tmp_path / "scratch" / "layer-00002.safetensors").unlink()
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "scratch").iterdir()}
    again, _ = run(tmp_path / "model", options)
    for name in selected:
        assert torch.equal(whole[name], again[name]), name
    for path, stamp in stamps.items():
        assert path.stat().st_mtime_ns == stamp
    other = small(text, method="auto", scratch=tmp_path / "scratch", sparsity=0.6)
    changed, _ = run(tmp_path / "model", other)
    name = "model.layers.0.mlp.down_proj.weight"
    assert int((changed[name] == 0).sum()) == int(changed[name].numel() * 0.6 + 0.5)


def test_a_linked_layer_is_neither_taken_nor_written_through(tmp_path, save, text):
    """The scratch folder may lie where others can write."""
    save(tmp_path / "model", "llama")
    options = small(text, method="wanda", scratch=tmp_path / "scratch")
    whole, selected = run(tmp_path / "model", options)
    layer = tmp_path / "scratch" / "layer-00001.safetensors"
    (tmp_path / "mine").write_bytes(layer.read_bytes())
    stamp = (tmp_path / "mine").stat().st_mtime_ns
    layer.unlink()
    for name in (layer.name, "layer-00001.partial"):
        (tmp_path / "scratch" / name).symlink_to(tmp_path / "mine")
    again, _ = run(tmp_path / "model", options)
    assert all(torch.equal(whole[name], again[name]) for name in selected)
    assert not layer.is_symlink()
    assert (tmp_path / "mine").stat().st_mtime_ns == stamp


def test_progress_counts_layers(tmp_path, save, text):
    save(tmp_path, "llama")
    seen = []
    run(tmp_path, small(text, method="wanda"), progress=lambda *what: seen.append(what))
    assert [(done, total) for done, total, _ in seen] == [(0, 3), (1, 3), (2, 3), (3, 3)]
    assert seen[0][2].startswith("about ")
    assert all("left, output error" in what for _, _, what in seen[1:])


@pytest.mark.parametrize("rule", ["linear:0.2", "owl:0.1"])
def test_allocation_reaches_the_layers(rule, tmp_path, save, text):
    save(tmp_path, "llama")
    tensors, selected = run(tmp_path, small(text, method="wanda", layer_sparsity=rule))
    zeros = [
        sum(int((tensors[name] == 0).sum()) for name in selected if f".layers.{layer}." in name)
        for layer in range(3)
    ]
    weights = sum(tensors[name].numel() for name in selected)
    assert len(set(zeros)) > 1
    assert sum(zeros) == pytest.approx(weights * 0.5, abs=len(selected))


def test_a_tensor_outside_the_layers_is_refused(tmp_path, save, text):
    save(tmp_path, "llama")
    with pytest.raises(PruningError, match=r"lm_head.*outside the decoder layers"):
        run(tmp_path, small(text, method="wanda"), frozenset({"lm_head.weight"}))


def test_a_tensor_that_is_no_matrix_of_a_linear_layer_is_refused(tmp_path, save, text):
    save(tmp_path, "llama")
    name = "model.layers.1.input_layernorm.weight"
    with pytest.raises(PruningError, match="whose inputs calibrated pruning does not know"):
        run(tmp_path, small(text, method="wanda"), frozenset({name}))


def test_a_text_shorter_than_a_window_is_refused(tmp_path, save):
    save(tmp_path, "llama")
    (tmp_path / "short.txt").write_text("too short")
    with pytest.raises(ConfigError, match="do not fill one window"):
        run(tmp_path, small(tmp_path / "short.txt", method="wanda"))


def test_config_names_the_method(tmp_path, save, text):
    save(tmp_path, "llama")
    with closing(open_source(tmp_path)) as source:
        selected = select(source.tensors.values())
        with closing(PrunedSource(source, small(text, method="wanda"), selected)) as pruned:
            description = json.loads(json.dumps(pruned.describe()))
    assert description["method"] == "wanda"
    assert description["windows"] == 20
    assert description["calibration"] == [text.name]


def test_layers_that_are_given_what_depends_on_the_tokens_are_refused(tmp_path, text):
    """One window's arguments, replayed for another window, would calibrate by the wrong inputs."""
    import transformers

    from tests.pruning.conftest import COMMON, HEAD, save_tokenizer

    if not hasattr(transformers, "Gemma4TextConfig"):
        pytest.skip("this transformers has no Gemma 4")
    sizes = {"hidden_size_per_layer_input": 16, "vocab_size_per_layer_input": 259}
    for name, fields in (("with", sizes), ("without", {"hidden_size_per_layer_input": 0})):
        config = transformers.Gemma4TextConfig(**COMMON, **HEAD, **fields, num_kv_shared_layers=0)
        torch.manual_seed(0)
        transformers.Gemma4ForCausalLM(config).save_pretrained(tmp_path / name)
        save_tokenizer(tmp_path / name)
    with pytest.raises(PruningError, match="depends on the tokens"):
        run(tmp_path / "with", small(text, method="wanda", sparsity=0.5))
    run(tmp_path / "without", small(text, method="wanda", sparsity=0.5))


def test_a_checkpoint_of_another_class_is_refused_for_what_it_is(tmp_path, text):
    """Bart's language model has an embedding of its own, which a Bart does not name."""
    import transformers

    from tests.pruning.conftest import save_tokenizer

    sizes = {f"{side}_{key}": 64 for side in ("encoder", "decoder") for key in ("ffn_dim",)}
    config = transformers.BartConfig(
        **sizes, vocab_size=259, d_model=64, encoder_layers=2, decoder_layers=2
    )
    torch.manual_seed(0)
    transformers.BartForConditionalGeneration(config).save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    with pytest.raises(PruningError, match="saved from BartForConditionalGeneration, not from"):
        run(tmp_path, small(text, method="wanda", sparsity=0.5))


def test_a_model_with_an_encoder_beside_its_decoder_is_refused(tmp_path, text):
    import transformers

    from tests.pruning.conftest import COMMON, HEAD, save_tokenizer

    if not hasattr(transformers, "T5Gemma2Config"):
        pytest.skip("this transformers has no T5Gemma 2")
    tower = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    vision = {**tower, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    config = transformers.T5Gemma2Config(
        encoder={"text_config": COMMON | HEAD, "vision_config": vision}, decoder=COMMON | HEAD
    )
    torch.manual_seed(0)
    transformers.T5Gemma2ForConditionalGeneration(config).save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    with pytest.raises(PruningError, match="has an encoder beside its decoder"):
        run(tmp_path, small(text, method="wanda", sparsity=0.5))


def test_a_weight_that_is_stored_under_the_name_of_another(tmp_path, text, save):
    """Of two parameters that share a weight, a file may name the one that comes later."""
    from safetensors.torch import load_file, save_file

    save(tmp_path, "gpt2")
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    assert "lm_head.weight" not in tensors
    tensors["lm_head.weight"] = tensors.pop("transformer.wte.weight")
    save_file(tensors, path, metadata={"format": "pt"})
    found, _ = run(tmp_path, small(text, method="wanda", sparsity=0.5))
    assert sum(float((item == 0).float().mean()) == 0.5 for item in found.values()) == 3 * 4


def test_the_language_model_inside_another_is_renewed(tmp_path, text):
    """By text; the tower for images keeps its values."""
    import transformers

    from tests.pruning.conftest import COMMON, save_tokenizer

    tower = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2}
    config = transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(**COMMON),
        vision_config=transformers.CLIPVisionConfig(
            **tower, num_hidden_layers=3, image_size=28, patch_size=14
        ),
        image_token_index=258,
    )
    torch.manual_seed(0)
    transformers.LlavaForConditionalGeneration(config).save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    tensors, selected = run(tmp_path, small(text, method="wanda", sparsity=0.5))
    inside = {name for name in selected if "language_model" in name}
    assert len(inside) == 3 * 5
    assert len(selected - inside) == 3 * 6
    with closing(open_source(tmp_path)) as source:
        for name, tensor in tensors.items():
            share = float((tensor == 0).float().mean())
            assert share == 0.5 if name in inside else torch.equal(tensor, read(source, name)), name


def test_what_cannot_be_renewed_is_refused_before_any_work(tmp_path, save, text, monkeypatch):
    save(tmp_path, "llama")
    monkeypatch.setattr(
        "endor.pruning.skeleton.Skeleton.trace", lambda *_: pytest.fail("work began")
    )
    odd = frozenset({"model.layers.2.input_layernorm.weight"})
    with pytest.raises(PruningError, match=r"layers\.2\.input_layernorm.*--exclude"):
        run(tmp_path, small(text, method="wanda", sparsity=0.5), odd)
