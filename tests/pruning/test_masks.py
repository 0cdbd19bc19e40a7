"""Masks: to a file and back for every method, held under any optimizer, and worth the training."""

import json
import runpy
import sys
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from endor.bench.quality.evaluate import shipped_text
from endor.checkpoint import open_source
from endor.checkpoint.select import select
from endor.errors import CheckpointError, ConfigError, OutputExistsError
from endor.packing import pack_checkpoint, prune_checkpoint
from endor.pruning import METHODS, PruneOptions, describe_masks, hold_masks, load_masks
from endor.pruning.calibration import shipped_texts
from endor.pruning.mask_writer import write_masks
from endor.pruning.masks import bitmask_shape, to_bitmask
from endor.pruning.methods.magnitude import Magnitude
from endor.pruning.source import PrunedSource

SCRIPT = Path(__file__).parents[2] / "scripts" / "finetune_sparse.py"


def masks_and_model(directory, out, options):
    """Write the masks and the pruned model of one method; return both, loaded."""
    with closing(open_source(directory)) as source:
        method = METHODS[options.method]
        selected = select(source.tensors.values())
        prune = None if method.calibrated else method.create(options)

        def pruned():
            return PrunedSource(source, options, selected) if method.calibrated else source

        report = write_masks(pruned(), out / "masks", prune=prune)
        prune_checkpoint(pruned(), out / "dense", prune=prune)
    return report, load_masks(out / "masks"), load_file(out / "dense" / "model.safetensors")


@pytest.mark.parametrize("method", METHODS)
def test_masks_are_the_non_zeros_of_the_pruned_model(method, tmp_path, save, text):
    save(tmp_path / "model", "llama")
    options = PruneOptions(method=method, calibration=(text,), samples=20, seq_len=32)
    report, masks, pruned = masks_and_model(tmp_path / "model", tmp_path, options)
    assert len(masks) == report.pruned_tensors == 15
    for name, mask in masks.items():
        assert mask.dtype == torch.bool
        assert torch.equal(mask, pruned[name] != 0)
    assert report.zeros == sum(int((~mask).sum()) for mask in masks.values())
    assert report.sparsity == pytest.approx(0.5, abs=1e-3)
    assert report.nbytes == (tmp_path / "masks").stat().st_size
    from_checkpoint = load_masks(tmp_path / "dense")
    assert from_checkpoint.keys() == masks.keys()
    assert all(torch.equal(from_checkpoint[name], mask) for name, mask in masks.items())


def test_the_file_says_how_they_were_found(tmp_path, save):
    save(tmp_path / "model", "llama")
    options = PruneOptions(method="magnitude", pattern="2:4")
    with closing(open_source(tmp_path / "model")) as source:
        write_masks(source, tmp_path / "masks", prune=Magnitude(options))
    found = describe_masks(tmp_path / "masks")
    assert found["method"] == "magnitude"
    assert found["pattern"] == "2:4"
    with pytest.raises(CheckpointError, match="holds no masks"):
        describe_masks(tmp_path / "model" / "model.safetensors")


def test_masks_of_a_packed_checkpoint_are_its_non_zeros(tmp_path, save):
    save(tmp_path / "model", "llama", torch.bfloat16)
    pack_checkpoint(tmp_path / "model", tmp_path / "packed", prune="magnitude")
    prune_checkpoint(tmp_path / "model", tmp_path / "dense", prune="magnitude")
    packed, dense = load_masks(tmp_path / "packed"), load_masks(tmp_path / "dense")
    assert packed.keys() == dense.keys()
    assert all(torch.equal(packed[name], dense[name]) for name in dense)


@given(st.integers(1, 5), st.integers(1, 33), st.integers(0, 2**32 - 1))
def test_bitmasks_keep_every_bit(rows, cols, seed):
    kept = np.random.default_rng(seed).random((2, rows, cols)) < 0.5
    bitmask = to_bitmask(kept)
    assert bitmask.shape == bitmask_shape(kept.shape)
    back = np.unpackbits(bitmask, axis=1, bitorder="little")
    assert np.array_equal(back[:, :cols].reshape(kept.shape), kept)
    assert not back[:, cols:].any()


def test_an_existing_file_is_replaced_only_when_asked(tmp_path, save):
    save(tmp_path / "model", "llama")
    (tmp_path / "masks").write_text("mine")
    with closing(open_source(tmp_path / "model")) as source:
        prune = Magnitude(PruneOptions(method="magnitude"))
        with pytest.raises(OutputExistsError, match="--overwrite"):
            write_masks(source, tmp_path / "masks", prune=prune)
        assert (tmp_path / "masks").read_text() == "mine"
        write_masks(source, tmp_path / "masks", prune=prune, overwrite=True)
        (tmp_path / ".masks.99999.0.tmp").write_text("what a killed run left")
        write_masks(source, tmp_path / "masks", prune=prune, overwrite=True)
    assert load_masks(tmp_path / "masks")
    assert [path.name for path in tmp_path.iterdir() if "masks" in path.name] == ["masks"]


def test_masks_never_replace_the_input_or_what_a_link_means(tmp_path, save):
    save(tmp_path / "model", "llama")
    before = (tmp_path / "model" / "model.safetensors").read_bytes()
    (tmp_path / "link").symlink_to("thesis")
    (tmp_path / "thesis").write_text("mine")
    prune = Magnitude(PruneOptions(method="magnitude"))
    for model in ("model", "model/model.safetensors"):
        with closing(open_source(tmp_path / model)) as source:
            for out in ("model/model.safetensors", "model/config.json", "model", "link"):
                if out == "model/config.json" and model != "model":
                    continue
                with pytest.raises(CheckpointError, match=r"input|no file"):
                    write_masks(source, tmp_path / out, prune=prune, overwrite=True)
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == before
    assert (tmp_path / "thesis").read_text() == "mine"


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ({"w.bitmask": torch.zeros(2, 1, dtype=torch.uint8)}, "needs a shape"),
        ({"w.bitmask": torch.zeros(2, 1), "w.shape": torch.tensor([2, 3])}, "uint8"),
        (
            {"w.bitmask": torch.zeros(2, 2, dtype=torch.uint8), "w.shape": torch.tensor([2, 3])},
            r"must be \[2, 1\]",
        ),
        (
            {
                "w.bitmask": torch.full((2, 1), 8, dtype=torch.uint8),
                "w.shape": torch.tensor([2, 3]),
            },
            "past column 3",
        ),
    ],
)
def test_a_damaged_file_is_refused(parts, words, tmp_path):
    save_file(parts, tmp_path / "masks", metadata={"endor.masks": "{}"})
    with pytest.raises(CheckpointError, match=words):
        load_masks(tmp_path / "masks")


def test_what_is_no_mask_is_refused(tmp_path, save):
    (tmp_path / "masks").write_text("text")
    for read in (load_masks, describe_masks):
        with pytest.raises(CheckpointError, match="must be a safetensors file"):
            read(tmp_path / "masks")
    save(tmp_path / "model", "llama")
    with pytest.raises(CheckpointError, match="no zeros"):
        load_masks(tmp_path / "model")


# ---- held ----------------------------------------------------------------------------------------


def halves(model):
    generator = torch.Generator().manual_seed(2)
    return {
        name: torch.rand(parameter.shape, generator=generator) < 0.5
        for name, parameter in model.named_parameters()
        if ".layers." in name and parameter.dim() == 2
    }


def step(model, optimizer):
    ids = torch.randint(3, 250, (2, 16), generator=torch.Generator().manual_seed(3))
    optimizer.zero_grad()
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()


def assert_held(model, masks):
    for name, mask in masks.items():
        absent = model.get_parameter(name).detach()[~mask]
        assert torch.equal(absent.view(torch.int32), torch.zeros(absent.numel(), dtype=torch.int32))


class Stubborn(torch.optim.Optimizer):
    """Moves every weight, whatever its gradient."""

    def __init__(self, parameters):
        super().__init__(parameters, {})

    def step(self):
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.data -= 1e-3


OPTIMIZERS = {
    "adamw": lambda given: torch.optim.AdamW(given, lr=1e-3, weight_decay=0.1),
    "adam_fused": lambda given: torch.optim.Adam(given, lr=1e-3, fused=True),
    "sgd": lambda given: torch.optim.SGD(given, lr=1e-2, momentum=0.9, weight_decay=0.1),
    "adafactor": lambda given: torch.optim.Adafactor(given, lr=1e-3),
    "stubborn": Stubborn,
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_zeros_stay_under_any_optimizer(optimizer, tmp_path, save):
    model = save(tmp_path, "llama")
    masks = halves(model)
    chosen = OPTIMIZERS[optimizer](model.parameters())
    with hold_masks(model, masks) as held:
        before = {name: model.get_parameter(name).detach().clone() for name in masks}
        assert held.sparsity == pytest.approx(0.5, abs=0.01)
        for _ in range(3):
            step(model, chosen)
            assert_held(model, masks)
    for name, mask in masks.items():
        moved = model.get_parameter(name).detach()[mask] != before[name][mask]
        assert moved.float().mean() > 0.9


def test_masked_gradients_are_zero_and_letting_go_frees_them(tmp_path, save):
    model = save(tmp_path, "llama")
    masks = halves(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    held = hold_masks(model, masks)
    step(model, optimizer)
    name, mask = next(iter(masks.items()))
    gradient = model.get_parameter(name).grad
    assert not gradient[~mask].any()
    assert gradient[mask].any()
    model.get_parameter(name).data += 1.0
    held.apply()
    assert_held(model, masks)
    held.remove()
    step(model, optimizer)
    assert model.get_parameter(name).detach()[~mask].any()


@pytest.mark.parametrize("architecture", ["mixtral", "qwen3_moe", "gpt2", "opt"])
def test_checkpoint_names_find_their_parameters(architecture, tmp_path, save):
    save(tmp_path / "model", architecture)
    prune_checkpoint(tmp_path / "model", tmp_path / "dense", prune="magnitude")
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    original = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with hold_masks(model, load_masks(tmp_path / "dense")):
        step(model, torch.optim.AdamW(model.parameters(), lr=1e-3))
    found, zeros = model.state_dict(), 0
    for name, tensor in dense.state_dict().items():
        absent = (tensor == 0) & (original[name] != 0)
        assert not found[name][absent].any()
        zeros += int(absent.sum())
    assert zeros > 10_000


def test_masks_of_another_model_are_refused(tmp_path, save):
    model = save(tmp_path, "llama")
    with pytest.raises(ConfigError, match="masks: no parameter"):
        hold_masks(model, {})
    with pytest.raises(ConfigError, match=r"model\.layers\.9\.x\.weight: no parameter"):
        hold_masks(model, {"model.layers.9.x.weight": torch.ones(2, 2, dtype=torch.bool)})
    name = "model.layers.0.mlp.up_proj.weight"
    with pytest.raises(CheckpointError, match="does not fit"):
        hold_masks(model, {name: torch.ones(2, 2, dtype=torch.bool)})


def windows(path, count, length=64):
    """Return `count` windows of the bytes of a text."""
    raw = torch.tensor(list(path.read_bytes()[1000 : 1000 + count * length]))
    return raw.view(count, length)


def train(model, ids, steps, rate):
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.01)
    for at in range(steps):
        batch = ids[at * 8 % len(ids) :][:8]
        optimizer.zero_grad()
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()


def loss(model, ids):
    with torch.no_grad():
        return float(model(input_ids=ids, labels=ids).loss)


@pytest.fixture
def one_thread():
    """So small a model is slower on several."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_training_the_survivors_wins_back_what_pruning_lost(tmp_path, one_thread):
    """A model that has learned a little English loses it by magnitude pruning, and gets it back."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config)
    seen, held_out = windows(shipped_texts("austen")[0], 400), windows(shipped_text(), 60)
    train(model, seen, 300, 2e-3)  # slower or shorter, it knows letters alone: nothing to lose
    dense_loss = loss(model, held_out)
    model.save_pretrained(tmp_path / "model")
    with closing(open_source(tmp_path / "model")) as source:
        prune = Magnitude(PruneOptions(method="magnitude", sparsity=0.9))
        write_masks(source, tmp_path / "masks", prune=prune)

    masks = load_masks(tmp_path / "masks")
    with hold_masks(model, masks):
        pruned_loss = loss(model, held_out)
        train(model, seen, 30, 2e-3)
    trained_loss = loss(model, held_out)
    assert pruned_loss > dense_loss + 0.3
    assert trained_loss < pruned_loss - 0.5 * (pruned_loss - dense_loss)
    assert_held(model, masks)

    model.save_pretrained(tmp_path / "trained")
    pack_checkpoint(tmp_path / "trained", tmp_path / "packed")
    packed = load_masks(tmp_path / "packed")
    assert all(not packed[name][~mask].any() for name, mask in masks.items())
    with safe_open(tmp_path / "masks", framework="pt") as file:
        assert json.loads(file.metadata()["endor.masks"])["sparsity"] == 0.9


@pytest.mark.parametrize("masks_alone", [False, True])
def test_the_script_keeps_the_zeros(masks_alone, tmp_path, save, text, monkeypatch):
    save(tmp_path / "model", "llama", torch.bfloat16)
    prune_checkpoint(tmp_path / "model", tmp_path / "pruned", prune="magnitude")
    with closing(open_source(tmp_path / "pruned")) as source:
        write_masks(source, tmp_path / "masks")
    given = ["--masks", "masks"] if masks_alone else ["--teacher", "model"]
    words = ["script", "model" if masks_alone else "pruned", "out", *given]
    words += [
        "--calibration",
        str(text),
        "--steps",
        "3",
        "--batch",
        "2",
        "--seq-len",
        "16",
        "--rate",
        "0.01",
    ]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", words)
    runpy.run_path(str(SCRIPT), run_name="__main__")
    found, before = (load_file(tmp_path / name / "model.safetensors") for name in ("out", words[1]))
    for name, mask in load_masks(tmp_path / "masks").items():
        assert found[name].dtype == torch.bfloat16
        assert not found[name][~mask].any()
        assert (found[name] != before[name])[mask].float().mean() > 0.1
