"""`from_pretrained` on a packed checkpoint: the dense model's bits, and its every promise kept."""

import gc
import json
import shutil
import warnings

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
)

import endor
from endor.errors import (
    BackendError,
    BudgetError,
    CheckpointError,
    ChecksumError,
    ConfigError,
    DependencyError,
    FormatError,
    ShapeError,
    TruncatedError,
)
from endor.hf import EndorConfig, EndorExperts, EndorLinear, quantizer
from endor.models.outline import outline
from endor.planning import Placement

from .conftest import config_of, least, prompt

DTYPES = [torch.bfloat16, torch.float32, torch.float16]
KINDS = ["llama", "mixtral", "qwen2_moe", "qwen3_moe", "opt", "gemma2"]


def load(pair, **options):
    return AutoModelForCausalLM.from_pretrained(pair.packed, **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_bit_equal(make_pair, kind, dtype):
    pair = make_pair(kind, dtype)
    model, info = load(pair, output_loading_info=True, experts_implementation="eager")
    assert not any(info.values()), info
    assert model.dtype == dtype
    assert any(isinstance(module, EndorLinear) for module in model.modules())
    assert any(isinstance(m, EndorExperts) for m in model.modules()) == (
        kind in ("mixtral", "qwen2_moe", "qwen3_moe")
    )
    pair.check(model)
    tight = endor.load_model(pair.packed, ram=least(model))
    assert {tight.endor.placement.tiers[unit.name] for unit in tight.endor.units} == {"disk"}
    pair.check(tight)
    assert tight.endor.ledger.counters.reads >= len(tight.endor.units)


@pytest.mark.parametrize("prune", [None, "magnitude"])
@pytest.mark.parametrize("codec", ["raw", "exp"])
def test_every_codec(make_pair, prune, codec):
    pair = make_pair("llama", prune=prune, pack={"codec": codec})
    pair.check(load(pair))


@pytest.mark.parametrize("tied", [True, False])
def test_tied_and_untied_heads(make_pair, tied):
    pair = make_pair("llama", tie_word_embeddings=tied)
    model = load(pair)
    pair.check(model)
    shared = model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    assert shared == tied


def test_a_packed_head(make_pair):
    pair = make_pair("llama", pack={"include": ["lm_head.weight"]})
    model = load(pair)
    assert isinstance(model.lm_head, EndorLinear)
    pair.check(model)


@pytest.mark.parametrize("tied", [True, False])
def test_packed_embeddings_are_expanded_at_load(make_pair, tied):
    pair = make_pair(
        "llama", tie_word_embeddings=tied, pack={"include": ["model.embed_tokens.weight"]}
    )
    model, info = load(pair, output_loading_info=True)
    assert not any(info.values()), info
    assert model.endor.report()["unpacked_at_load"] == ["model.embed_tokens.weight"]
    pair.check(model)


def test_modules_of_another_make_stay_packed(make_pair):
    pair = make_pair("gpt2")
    model = load(pair)
    assert "transformer.h.0.attn.c_attn.weight" in model.endor.weights
    assert not model.endor.unpacked
    pair.check(model)


@pytest.mark.parametrize("kind", ["llama", "mixtral"])
def test_generation_is_equal(make_pair, kind):
    pair = make_pair(kind)
    model = load(pair, experts_implementation="eager")
    tight = endor.load_model(pair.packed, ram=least(model))
    ids = prompt()
    for options in (
        {"do_sample": False},
        {"do_sample": True, "top_k": 20},
        {"do_sample": False, "num_beams": 3},
        {"do_sample": False, "cache_implementation": "static"},
    ):
        texts = []
        for each in (pair.dense, model, tight):
            torch.manual_seed(7)
            mask = torch.ones_like(ids)
            texts.append(each.generate(ids, attention_mask=mask, max_new_tokens=10, **options))
        assert torch.equal(texts[0], texts[1]), options
        assert torch.equal(texts[0], texts[2]), options


def test_assisted_generation_is_equal(pair):
    model, helper = load(pair), load(pair)
    ids = prompt(1)
    for options in ({"prompt_lookup_num_tokens": 3}, {"assistant_model": helper}):
        dense = dict(options)
        if "assistant_model" in dense:
            dense["assistant_model"] = pair.dense
        a = pair.dense.generate(ids, max_new_tokens=10, do_sample=False, **dense)
        b = model.generate(ids, max_new_tokens=10, do_sample=False, **options)
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    "device_map",
    [
        "cpu",
        "auto",
        {"": "cpu"},
        {"": torch.device("cpu")},
        {"model.layers.0": "cpu", "model.layers.1": "disk", "model.layers.2": "disk", "": "cpu"},
    ],
    ids=str,
)
def test_device_maps_are_wishes(pair, device_map):
    model = load(pair, device_map=device_map)
    pair.check(model)
    assert not any(hasattr(module, "_hf_hook") for module in model.modules())
    tiers = model.endor.placement.tiers
    for name, weight in model.endor.weights.items():
        wish = {"resident", "dense"}  # in memory, in the form that is faster here
        if isinstance(device_map, dict) and ".layers.0." not in name and len(device_map) > 1:
            wish = {"disk"}
        assert {tiers[state.unit.name] for state in weight.states} <= wish, name


def test_max_memory_limits_the_weights(pair):
    need = least(load(pair))
    model = load(pair, device_map="auto", max_memory={"cpu": need})
    assert set(model.endor.placement.tiers.values()) == {"disk"}
    pair.check(model)


@pytest.mark.parametrize("device_map", [None, "cpu", "auto", "balanced", "sequential", {"": "cpu"}])
def test_max_memory_is_a_budget_whatever_the_map(pair, device_map):
    """Also without a map: a limit that somebody gives is kept."""
    need = least(load(pair))
    model = load(pair, device_map=device_map, max_memory={"cpu": need})
    assert model.endor_plan.ram_bytes == need
    assert set(model.endor.placement.tiers.values()) == {"disk"}
    pair.check(model)
    assert model.hf_device_map == {"": torch.device("cpu")}
    with pytest.raises(BudgetError, match=rf"at least .* \({need} bytes\)"):
        load(pair, device_map=device_map, max_memory={"cpu": "0.5KB"})


def test_sizes_as_accelerate_writes_them(pair):
    model = load(pair, device_map="auto", max_memory={"cpu": "2MiB"})
    assert model.endor_plan.ram_bytes == 2 << 20
    with pytest.raises(ValueError, match="not in a valid format"):
        load(pair, device_map="auto", max_memory={"cpu": "two"})
    with pytest.raises(ValueError, match="not recognized"):
        load(pair, device_map="auto", max_memory={"ram": "2MiB"})
    with pytest.raises(ConfigError, match="max_memory: 'cpu' must have bytes"):
        load(pair, device_map="auto", max_memory={"cpu": -5})


@pytest.mark.skipif(torch.cuda.is_available(), reason="the device is there")
def test_a_limit_of_a_device_that_is_not_there(pair):
    with pytest.raises(BackendError, match=r"max_memory: cuda:0.*leave it out"):
        load(pair, device_map="auto", max_memory={0: "6GiB", "cpu": "16GiB"})


def test_maps_that_do_not_fit_the_model(pair):
    with pytest.raises(ConfigError, match=r"'model\.layer' is no module"):
        load(pair, device_map={"": "cpu", "model.layer": "disk"})
    with pytest.raises(ConfigError, match=r"gives no device for"):
        load(pair, device_map={"model.layers": "cpu"})


def test_a_budget_too_small_for_the_wishes_names_the_least(pair):
    places = {"": "cpu", "model.layers.0": "disk"}
    with pytest.raises(BudgetError, match=r"\((\d+) bytes\)") as error:
        load(pair, device_map=places, max_memory={"cpu": 1})
    need = int(str(error.value).partition("(")[2].partition(" ")[0])
    model = load(pair, device_map=places, max_memory={"cpu": need})
    assert sorted(set(model.endor.placement.tiers.values())) == ["disk", "resident"]
    pair.check(model)
    with pytest.raises(BudgetError):
        load(pair, device_map=places, max_memory={"cpu": need - 1})


@pytest.mark.parametrize("device_map", ["cuda:0", {"": 0}, {"model": "cpu", "lm_head": "mps"}])
def test_other_devices_are_refused(pair, device_map):
    with pytest.raises(BackendError, match="device_map"):
        load(pair, device_map=device_map)


def test_a_users_config_is_honoured(pair):
    need = least(load(pair))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # transformers tells which attributes it overwrites
        model = load(
            pair, quantization_config=EndorConfig(ram=need, exact=False, reader="buffered")
        )
    assert set(model.endor.placement.tiers.values()) == {"disk"}
    assert model.endor.report()["reader"]["requested"] == "buffered"
    assert not model.model.layers[0].mlp.up_proj.exact
    saved = json.loads(model.config.to_json_string())["quantization_config"]
    assert saved == json.loads((pair.packed / "config.json").read_text())["quantization_config"]


def test_a_config_may_be_used_twice(pair):
    first = load(pair)
    pair.check(load(pair, config=first.config))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_another_dtype_is_a_conversion(pair, dtype):
    """As transformers does with a dense checkpoint: loaded in one dtype, run in another."""
    dense = AutoModelForCausalLM.from_pretrained(pair.dense_dir, dtype=dtype)
    model = load(pair, dtype=dtype)
    assert model.dtype == dtype
    assert model.model.layers[0].mlp.up_proj.weight.dtype == dtype
    assert torch.equal(pair.logits(model), pair.logits(dense))


def test_a_placement_is_obeyed(pair):
    units = load(pair).endor.units
    tiers = {unit.name: ("dense", "resident", "disk")[unit.index % 3] for unit in units}
    placement = Placement(tiers, max(unit.nbytes for unit in units))
    model = endor.load_model(pair.packed, placement=placement)
    pair.check(model)
    assert model.endor.placement is placement or model.endor.placement == placement


def test_budgets_are_obeyed_or_refused(pair):
    need = least(load(pair))
    with pytest.raises(BudgetError, match="raise ram"):
        endor.load_model(pair.packed, ram=need - 1)
    model = endor.load_model(pair.packed, ram=need + 30_000)
    assert model.get_memory_footprint() <= need + 30_000
    tiers = list(model.endor.placement.tiers.values())
    assert 0 < tiers.count("resident") < len(tiers)
    pair.check(model)


def test_fast_products_are_close(pair):
    model = endor.load_model(pair.packed, exact=False)
    one = prompt(1, 1)
    exact, fast = pair.logits(pair.dense, one).float(), pair.logits(model, one).float()
    assert model.endor.ledger.counters.products > 0
    assert (exact - fast).abs().max() <= 0.05 * exact.abs().max()
    pair_of_rows = pair.logits(model)  # 22 rows: expanded, hence exact
    assert torch.equal(pair_of_rows, pair.logits(pair.dense))


def test_compilation_is_not_attempted(pair):
    assert load(pair).hf_quantizer.is_compileable is False


def test_several_models_live_side_by_side(make_pair, pair):
    other = make_pair("mixtral")
    need = least(load(pair))
    models = [endor.load_model(pair.packed, ram=need) for _ in range(2)]
    third = load(other, experts_implementation="eager")
    for _ in range(2):
        pair.check(models[0])
        other.check(third)
        pair.check(models[1])
    models[0].endor.close()
    pair.check(models[1])


def test_a_deleted_model_leaves_no_thread(pair):
    import threading

    def alive():
        return {t for t in threading.enumerate() if t.name.startswith("endor-")}

    before = alive()
    model = endor.load_model(pair.packed, ram=least(load(pair)))
    pair.check(model)
    mine = alive() - before
    assert mine
    gc.disable()  # no cycle keeps the model: it goes at once
    try:
        del model
    finally:
        gc.enable()
    for thread in mine:
        thread.join(60)
        assert not thread.is_alive()


def copy_of(pair, folder):
    shutil.copytree(pair.packed, folder)
    return folder


def shard(folder):
    return next(folder.glob("endor-*.safetensors"))


def test_damage_is_an_error_never_a_wrong_weight(pair, tmp_path):
    """A byte of every record in turn: loading or running fails."""
    from endor.storage import FileLayout

    folder = copy_of(pair, tmp_path / "damaged")
    path = shard(folder)
    for record in FileLayout.read(path).records.values():
        flip(path, record.offset + 100)
        with pytest.raises(ChecksumError):
            pair.logits(AutoModelForCausalLM.from_pretrained(folder))
        flip(path, record.offset + 100)
    pair.check(AutoModelForCausalLM.from_pretrained(folder))


def flip(path, offset):
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1]))


def test_a_truncated_file_is_refused(pair, tmp_path):
    folder = copy_of(pair, tmp_path / "short")
    path = shard(folder)
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 4096)
    with pytest.raises(TruncatedError):
        AutoModelForCausalLM.from_pretrained(folder)


def test_a_file_that_shrinks_mid_run_is_an_error(pair, tmp_path):
    folder = copy_of(pair, tmp_path / "shrinks")
    model = endor.load_model(folder, ram=least(load(pair)))
    pair.check(model)
    with shard(folder).open("r+b") as file:
        file.truncate(4096 * 8)

    def run():
        for _ in range(3):
            pair.logits(model)

    with pytest.raises(endor.EndorError, match="truncated"):
        run()


def test_an_unknown_version_is_refused(pair, tmp_path):
    folder = copy_of(pair, tmp_path / "newer")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["format_version"] = 7
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(FormatError, match="format_version must be 1 to 6, got 7"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_weights_that_were_quantized_before_are_refused(pair, tmp_path):
    """fp8 weights have scales beside them: without those the model would be nonsense."""
    folder = copy_of(pair, tmp_path / "fp8")
    config = json.loads((folder / "config.json").read_text())
    section = config["quantization_config"]
    section["source_quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (folder / "config.json").write_text(json.dumps(config))
    for run in (AutoModelForCausalLM.from_pretrained, endor.load_model, outline):
        with pytest.raises(ConfigError, match=r"quantized \(fp8\).*endor unpack"):
            run(folder)


def test_config_and_weights_must_agree(pair, tmp_path):
    folder = copy_of(pair, tmp_path / "other")
    config = json.loads((folder / "config.json").read_text())
    config["intermediate_size"] = 128
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ShapeError, match="do not belong together"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_a_missing_shard_is_refused(make_pair, tmp_path):
    pair = make_pair(
        "llama", hidden_size=256, intermediate_size=512, pack={"max_shard_bytes": 1 << 20}
    )
    pair.check(load(pair))
    folder = copy_of(pair, tmp_path / "lost")
    lost = sorted(folder.glob("endor-*.safetensors"))[1]
    lost.unlink()
    with pytest.raises(CheckpointError, match=lost.name):
        AutoModelForCausalLM.from_pretrained(folder)
    index = folder / "endor.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"] = {k: v for k, v in content["weight_map"].items() if v != lost.name}
    index.write_text(json.dumps(content))
    with pytest.raises(FormatError, match="name different shards"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_the_base_model_and_a_new_head_load(pair):
    base = AutoModel.from_pretrained(pair.packed)
    with torch.no_grad():
        expected = pair.dense.model(prompt()).last_hidden_state
        assert torch.equal(base(prompt()).last_hidden_state, expected)
    model, info = AutoModelForSequenceClassification.from_pretrained(
        pair.packed, num_labels=3, output_loading_info=True
    )
    assert set(info["missing_keys"]) == {"score.weight"}
    assert isinstance(model.model.layers[0].mlp.up_proj, EndorLinear)


def test_a_model_that_the_weights_do_not_fill_is_refused(make_pair):
    """Renamed modules: what is packed goes nowhere, what the model has stays empty."""
    pair = make_pair("llama")
    config = config_of("opt")
    config.quantization_config = AutoConfig.from_pretrained(pair.packed).quantization_config
    with pytest.raises(CheckpointError, match="takes it nowhere"):
        AutoModelForCausalLM.from_pretrained(pair.packed, config=config)


def test_parameters_that_were_not_taken(pair, monkeypatch):
    """Had transformers kept its own list of files, the parameters would be random."""
    real = quantizer.check_taken

    def spoiled(plain, model):
        for parameter in model.parameters():
            parameter.data = torch.randn_like(parameter)
        real(plain, model)

    monkeypatch.setattr(quantizer, "check_taken", spoiled)
    with pytest.raises(DependencyError, match=r"transformers [0-9.]+: it did not load"):
        load(pair)

    def emptied(plain, model):
        for module in model.modules():
            for leaf, parameter in module._parameters.items():
                if parameter is not None:
                    module._parameters[leaf] = torch.nn.Parameter(parameter.to("meta"))
        real(plain, model)

    monkeypatch.setattr(quantizer, "check_taken", emptied)
    with pytest.raises(DependencyError, match=r"without a value"):
        load(pair)


def test_a_loader_that_does_not_call_the_quantizer(pair, monkeypatch):
    monkeypatch.setattr(
        "transformers.LlamaForCausalLM.from_pretrained", lambda *_, **__: torch.nn.Module()
    )
    with pytest.raises(DependencyError, match="did not call Endor's quantizer"):
        endor.load_model(pair.packed)
