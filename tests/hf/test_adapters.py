"""Adapters of PEFT on packed weights: the dense model's loss and gradients, base never written."""

import copy
import shutil
import warnings
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import endor
from endor.errors import ConfigError, DependencyError
from endor.hf import EndorLinear, adapters, load_model

from .conftest import least, prompt
from .test_register import run

if find_spec("peft") is None:
    pytest.skip("peft is not installed (pip install peft)", allow_module_level=True)

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import peft

# peft and transformers warn of each other's deprecated names, of which they use some.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")

KINDS = {
    "lora": lambda: peft.LoraConfig(
        r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False
    ),
    "all-linear": lambda: peft.LoraConfig(r=4, target_modules="all-linear"),
    "dora": lambda: peft.LoraConfig(
        r=4, target_modules=["q_proj", "up_proj"], use_dora=True, init_lora_weights=False
    ),
    "ia3": lambda: peft.IA3Config(
        target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]
    ),
    "loha": lambda: peft.LoHaConfig(r=4, target_modules=["q_proj"], init_weights=False),
    "lokr": lambda: peft.LoKrConfig(r=4, target_modules=["q_proj"], init_weights=False),
    "oft": lambda: peft.OFTConfig(oft_block_size=8, target_modules=["q_proj", "down_proj"]),
    "vera": lambda: peft.VeraConfig(r=4, target_modules=["q_proj"]),
    "adalora": lambda: peft.AdaLoraConfig(
        init_r=4, target_r=2, total_step=9, target_modules=["q_proj"]
    ),
}


def packed_of(pair, tier):
    model = load_model(pair.packed)
    if tier == "streamed":
        model = load_model(pair.packed, ram=least(model))
        assert set(model.endor.placement.tiers.values()) == {"disk"}
    return model


def adapted(model, kind):
    torch.manual_seed(5)
    return peft.get_peft_model(model, KINDS[kind]())


def two_steps(model):
    """Return the loss and the gradients of each of two steps of training."""
    model.train()
    chosen = {name: item for name, item in model.named_parameters() if item.requires_grad}
    assert chosen
    optimizer = torch.optim.SGD(chosen.values(), lr=0.5)
    found = []
    for _ in range(2):
        optimizer.zero_grad()
        loss = model(prompt(), labels=prompt()).loss
        loss.backward()
        found.append((loss.detach(), {name: item.grad.clone() for name, item in chosen.items()}))
        optimizer.step()
    return found


def is_packed(module):
    return isinstance(getattr(module, "base_layer", None), EndorLinear)


def logits(model):
    model.eval()
    with torch.no_grad():
        return model(prompt()).logits


@pytest.mark.parametrize("tier", ["resident", "streamed"])
@pytest.mark.parametrize("kind", KINDS)
def test_two_steps_are_those_of_the_dense_model(pair, tier, kind):
    model = adapted(packed_of(pair, tier), kind)
    for found, expected in zip(
        two_steps(model), two_steps(adapted(copy.deepcopy(pair.dense), kind)), strict=True
    ):
        assert torch.equal(found[0], expected[0])
        assert list(found[1]) == list(expected[1])
        for name in found[1]:
            assert torch.equal(found[1][name], expected[1][name]), name


@pytest.mark.parametrize("tier", ["resident", "streamed"])
def test_an_adapter_is_saved_loaded_and_applied(pair, tier, tmp_path):
    model = adapted(packed_of(pair, tier), "lora")
    two_steps(model)
    model.save_pretrained(tmp_path)
    expected = logits(model)
    with model.disable_adapter():
        pair.check(model)
    again = peft.PeftModel.from_pretrained(packed_of(pair, tier), tmp_path)
    assert torch.equal(logits(again), expected)
    assert not torch.equal(expected, pair.logits(pair.dense))
    again.unload()
    both = [packed_of(pair, tier), copy.deepcopy(pair.dense)]
    for other in both:
        other.load_adapter(str(tmp_path))
    assert torch.equal(logits(both[0]), logits(both[1]))


@pytest.mark.parametrize("kind", KINDS)
def test_merging_is_refused_and_changes_nothing(pair, kind):
    model = adapted(load_model(pair.packed), kind)
    expected = logits(model)
    for merge in (
        model.merge_and_unload,
        lambda: model.merge_and_unload(safe_merge=True),
        model.merge_adapter,
        next(m for m in model.modules() if is_packed(m)).merge,
    ):
        with pytest.raises(ConfigError, match=r"merged into: unpack the checkpoint \(endor unpack"):
            merge()
        assert torch.equal(logits(model), expected)


def test_a_refused_merge_leaves_unpacked_layers_unmerged(pair):
    model = load_model(pair.packed)
    config = peft.LoraConfig(
        r=4, target_modules=["embed_tokens", "q_proj"], init_lora_weights=False
    )
    model = peft.get_peft_model(model, config)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ConfigError, match="merged into"):
            merge()
        tuned = [module for module in model.modules() if hasattr(module, "base_layer")]
        assert len(tuned) == 4
        assert not any(module.merged for module in tuned)
    alone = peft.LoraConfig(r=4, target_modules=["embed_tokens"], init_lora_weights=False)
    model = peft.get_peft_model(load_model(pair.packed), alone)
    expected = logits(model)
    torch.testing.assert_close(logits(model.merge_and_unload()), expected, rtol=0.1, atol=0.3)


def test_peft_may_be_imported_first_or_last(pair):
    for imports in ("import peft, endor", "import endor", "import peft.tuners.tuners_utils, endor"):
        done = run(
            imports + "\nmodel = endor.load_model(sys.argv[1])\n"
            "import peft\n"
            "model = peft.get_peft_model(model, peft.IA3Config(target_modules=['q_proj'],"
            " feedforward_modules=[]))\n"
            "try: model.merge_adapter()\n"
            "except endor.EndorError as error: print('refused')\n"
            "layer = model.base_model.model.model.layers[0].self_attn.q_proj\n"
            "try: layer.merge()\n"
            "except endor.EndorError as error: print(layer.merged)\n",
            str(pair.packed),
        )
        assert done.stdout.split() == ["refused", "False"], done.stderr


def test_a_peft_without_the_checks_is_an_error():
    with pytest.raises(DependencyError, match="has no check_adapters_to_merge"):
        adapters.guard(SimpleNamespace(BaseTuner=object, BaseTunerLayer=object))


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_initialisations_that_change_the_base_are_refused(pair, init):
    with pytest.raises(ConfigError, match="unpack the checkpoint"):
        peft.get_peft_model(
            load_model(pair.packed),
            peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=init),
        )


def test_the_trainer_takes_adapters_and_nothing_else(pair, tmp_path):
    arguments = TrainingArguments(
        tmp_path, max_steps=2, report_to=[], use_cpu=True, disable_tqdm=True, save_strategy="no"
    )
    row = {"input_ids": prompt()[0], "labels": prompt()[0]}
    with pytest.raises(ValueError, match="purely quantized"):
        Trainer(load_model(pair.packed), arguments)
    model = adapted(load_model(pair.packed), "lora")
    assert Trainer(model, arguments, train_dataset=[row] * 4).train().global_step == 2


@pytest.mark.parametrize("tier", ["resident", "streamed"])
def test_an_adapter_that_lies_beside_the_model(pair, tmp_path, tier):
    """transformers loads both; so it does from a packed checkpoint, whichever call is used."""
    saved = adapted(AutoModelForCausalLM.from_pretrained(pair.dense_dir), "lora")
    saved.save_pretrained(tmp_path / "adapter")
    shutil.copytree(pair.dense_dir, tmp_path / "dense")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(tmp_path / "adapter" / name, tmp_path / "dense" / name)
    endor.pack_checkpoint(tmp_path / "dense", tmp_path / "packed", threads=1)
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", experts_implementation="eager")
    for parameter in dense.parameters():
        parameter.data = parameter.data.clone()
    wanted = pair.logits(dense)
    assert not torch.equal(wanted, pair.logits(pair.dense))
    ram = least(load_model(pair.packed)) if tier == "streamed" else None
    for model in (
        load_model(tmp_path / "packed", ram=ram),
        AutoModelForCausalLM.from_pretrained(tmp_path / "packed"),
    ):
        assert torch.equal(pair.logits(model), wanted)
