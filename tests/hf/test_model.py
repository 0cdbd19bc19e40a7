"""Saving, copying, converting and measuring a model with packed weights."""

import copy
import json
import pickle
import shutil
from itertools import chain
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, pipeline
from transformers.generation import BaseStreamer

import endor
from endor.checkpoint.loadable import is_packed, read_config
from endor.errors import BackendError, ConfigError, DependencyError, OutputExistsError
from endor.hf import pipelines
from endor.models.outline import parameter_bytes

from .conftest import least


@pytest.fixture
def model(pair):
    return endor.load_model(pair.packed)


def test_save_pretrained_copies(pair, model, tmp_path):
    model.generation_config.max_new_tokens = 7
    model.save_pretrained(tmp_path / "saved")
    for file in pair.packed.glob("endor*"):
        assert (tmp_path / "saved" / file.name).read_bytes() == file.read_bytes()
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert config["quantization_config"] == read_config(pair.packed)["quantization_config"]
    assert "transformers_weights" not in config
    again = endor.load_model(tmp_path / "saved")
    assert again.generation_config.max_new_tokens == 7
    pair.check(again)
    with pytest.raises(OutputExistsError):
        model.save_pretrained(tmp_path / "saved")


def test_saving_leaves_nothing_half_written(model, tmp_path):
    model.save_pretrained(tmp_path / "other", is_main_process=False)
    assert not (tmp_path / "other").exists()
    model.save_pretrained(tmp_path / "saved")
    assert not [path for path in (tmp_path / "saved").iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize(
    "options",
    [
        {"state_dict": {}},
        {"push_to_hub": True},
        {"safe_serialization": False},
        {"variant": "fp16"},
    ],
    ids=str,
)
def test_saving_refuses_what_it_cannot_do(model, tmp_path, options):
    with pytest.raises(ConfigError, match="save_pretrained copies"):
        model.save_pretrained(tmp_path, **options)


def test_saving_refuses_changed_parameters(model, tmp_path):
    with torch.no_grad():
        model.model.norm.weight.mul_(2)
    with pytest.raises(ConfigError, match=r"model\.norm\.weight: changed"):
        model.save_pretrained(tmp_path / "saved")


def test_the_class_method_does_not_write_wrong_files(model, tmp_path):
    with pytest.raises(ValueError, match="not serializable"):
        type(model).save_pretrained(model, tmp_path / "saved")


def test_conversions(pair, model):
    assert model.to("cpu") is model
    for convert in (model.half, model.float):
        with pytest.raises(ValueError, match="not supported for quantized model"):
            convert()
    for convert in (model.double, lambda: model.to(torch.float32)):
        with pytest.raises(ConfigError, match="keep their dtype"):
            convert()
    with pytest.raises(BackendError, match="loaded for the CPU"):
        model.to("meta")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}, "refused as a whole"
    pair.check(model)


def test_deepcopy_shares_packed_weights_only(pair, model, tmp_path):
    twin = copy.deepcopy(model)
    assert twin.endor is model.endor
    a, b = model.model.norm.weight, twin.model.norm.weight
    assert a.data_ptr() != b.data_ptr()
    with torch.no_grad():
        b.mul_(0)
    del model
    assert not torch.equal(pair.logits(twin), pair.logits(pair.dense))
    assert twin.num_parameters() == pair.dense.num_parameters()
    with pytest.raises(ConfigError, match="changed"):
        twin.save_pretrained(tmp_path / "saved")


def test_pickling_is_refused(model, tmp_path):
    with pytest.raises(ConfigError, match="save_pretrained"):
        pickle.dumps(model)
    with pytest.raises(ConfigError, match="save_pretrained"):
        torch.save(model, tmp_path / "model.pt")


def test_counts(pair, model):
    assert model.num_parameters() == pair.dense.num_parameters()
    assert model.num_parameters(exclude_embeddings=True) == pair.dense.num_parameters(
        exclude_embeddings=True
    )
    unpacked = sum(p.numel() for p in model.parameters())
    assert model.num_parameters(only_trainable=True) == unpacked
    assert model.num_parameters() == unpacked + model.endor.numel
    footprint = model.get_memory_footprint()
    store, tiers = model.endor, model.endor.placement.tiers
    held = sum(
        unit.dense_nbytes if tiers[unit.name] == "dense" else unit.nbytes for unit in store.units
    )
    passing = store.staging_bytes + store.scratch_nbytes
    assert footprint == parameter_bytes(model) + held + passing
    assert str(model.device) == "cpu"
    assert model.dtype == torch.bfloat16


def test_an_exception_in_a_forward_leaves_the_model_usable(pair):
    first = endor.load_model(pair.packed)
    model = endor.load_model(pair.packed, ram=least(first))

    def stop(*_):
        raise KeyboardInterrupt

    handle = model.model.layers[1].mlp.register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        pair.logits(model)
    handle.remove()
    pair.check(model)


@pytest.mark.parametrize("tight", [False, True])
def test_resizing_embeddings_expands_a_packed_head(make_pair, tmp_path, tight):
    pair = make_pair("llama", pack={"include": ["lm_head.weight"]})
    model = endor.load_model(pair.packed)
    if tight:
        model = endor.load_model(pair.packed, ram=least(model))
    model.resize_token_embeddings(300)
    expected = pair.logits(pair.dense)
    for _ in range(2):
        torch.testing.assert_close(pair.logits(model)[..., :211], expected, rtol=2e-2, atol=2e-2)
    assert torch.equal(model.lm_head.weight[:211], pair.dense.lm_head.weight)
    with pytest.raises(ConfigError, match="changed since the model was loaded"):
        model.save_pretrained(tmp_path)


def test_pipelines(pair, tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path / "packed")
    for file in pair.packed.iterdir():
        (tmp_path / "packed" / file.name).write_bytes(file.read_bytes())
    texts = []
    for model in (str(tmp_path / "packed"), pair.dense):
        pipe = pipeline("text-generation", model, tokenizer=tokenizer)
        texts.append(pipe("w5 w6 w7", max_new_tokens=6, do_sample=False)[0]["generated_text"])
    assert texts[0] == texts[1]
    assert len(texts[0].split()) > 3


@pytest.mark.parametrize("device", ["cpu", -1, torch.device("cpu")], ids=str)
def test_a_pipeline_takes_the_device_where_the_model_is(pair, model, tokenizer, device):
    texts = []
    for each in (model, pair.dense):
        pipe = pipeline("text-generation", each, tokenizer=tokenizer, device=device)
        assert pipe.device == torch.device("cpu")
        texts.append(pipe("w5 w6 w7", max_new_tokens=6, do_sample=False)[0]["generated_text"])
    assert texts[0] == texts[1]


@pytest.mark.parametrize("device", [0, "cuda", "cuda:1", "meta"])
def test_a_pipeline_does_not_move_packed_weights(model, tokenizer, device):
    with pytest.raises(ValueError, match="cannot be moved to a specific device"):
        pipeline("text-generation", model, tokenizer=tokenizer, device=device)


def test_pipelines_of_another_form_are_an_error():
    with pytest.raises(DependencyError, match="has no Pipeline"):
        pipelines.allow_own_device(SimpleNamespace())


def test_a_pipeline_takes_a_directory_and_its_options(pair, tokenizer, tmp_path):
    """Only the directory is named; the budget goes where transformers takes model options."""
    folder = tmp_path / "packed"
    shutil.copytree(pair.packed, folder)
    tokenizer.save_pretrained(folder)
    need = least(endor.load_model(pair.packed))
    pipe = pipeline(
        "text-generation",
        model=str(folder),
        device_map="auto",
        model_kwargs={"max_memory": {"cpu": need}},
    )
    assert pipe.model.endor_plan.ram_bytes == need
    assert set(pipe.model.endor.placement.tiers.values()) == {"disk"}
    dense = pipeline("text-generation", pair.dense, tokenizer=tokenizer)
    text = [each("w5 w6", max_new_tokens=5, do_sample=False) for each in (pipe, dense)]
    assert text[0] == text[1]


def test_a_streamer_gets_the_tokens_one_by_one(pair):
    class Tokens(BaseStreamer):
        def __init__(self):
            self.pieces, self.ended = [], False

        def put(self, value):
            self.pieces.append(value.flatten().tolist())

        def end(self):
            self.ended = True

    ids, found = torch.tensor([[5, 6, 7]]), []
    for model in (endor.load_model(pair.packed), pair.dense):
        streamer = Tokens()
        text = model.generate(ids, max_new_tokens=6, do_sample=False, streamer=streamer)
        assert streamer.ended
        assert list(chain(*streamer.pieces)) == text[0].tolist()
        assert [len(piece) for piece in streamer.pieces] == [3, 1, 1, 1, 1, 1, 1]
        found.append(streamer.pieces)
    assert found[0] == found[1]


def test_is_packed(pair, tmp_path):
    assert is_packed(pair.packed)
    assert not is_packed(pair.dense_dir)
    with pytest.raises(ConfigError, match="not found"):
        is_packed(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ConfigError, match="JSON object"):
        is_packed(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="must be JSON"):
        is_packed(tmp_path)


def test_load_model_says_what_it_cannot_do(pair):
    with pytest.raises(ConfigError, match="names no packed checkpoint"):
        endor.load_model(pair.dense_dir)
    with pytest.raises(ConfigError, match="ram must be bytes"):
        endor.load_model(pair.packed, ram="lots")
    with pytest.raises(ConfigError, match="vram"):
        endor.load_model(pair.packed, vram="1GiB")


def test_other_attention_implementations(pair):
    model = endor.load_model(pair.packed, attn_implementation="eager")
    dense = AutoModelForCausalLM.from_pretrained(pair.dense_dir, attn_implementation="eager")
    assert torch.equal(pair.logits(model), pair.logits(dense))
