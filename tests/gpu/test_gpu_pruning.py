"""Calibrated pruning on a real device: the CPU's counts exactly, and its masks but for ties."""

from contextlib import closing

import numpy as np
import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from endor.checkpoint import open_source
from endor.checkpoint.plan import plan_units
from endor.checkpoint.select import select
from endor.packed import tensor_of
from endor.pruning import METHODS, PruneOptions, hold_masks
from endor.pruning.source import PrunedSource

pytestmark = pytest.mark.gpu

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

SIZES = {
    "vocab_size": 259,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 128,
    "initializer_range": 0.1,
}
KINDS = {
    "llama": transformers.LlamaConfig(**SIZES),
    "gemma2": transformers.Gemma2Config(**SIZES, head_dim=16, sliding_window=8),
    "mixtral": transformers.MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2),
}
AGREEMENT = {"wanda": 0.999, "sparsegpt": 0.99, "admm": 0.99, "alps": 0.97, "auto": 0.98}
"""Share of equal mask bits: the methods that iterate amplify the rounding of float32 sums."""


@pytest.fixture(params=sorted(KINDS))
def model(request, tmp_path):
    """A random model with a tokenizer of single bytes, and a text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(KINDS[request.param]).save_pretrained(tmp_path)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(tmp_path)
    picks = torch.randint(97, 123, (6000,), generator=torch.Generator().manual_seed(1))
    (tmp_path / "text.txt").write_bytes(bytes(picks.tolist()))
    return tmp_path


def pruned(directory, method, device, **fields):
    """Return all pruned tensors of a run on `device`."""
    options = PruneOptions(
        method=method,
        calibration=(directory / "text.txt",),
        samples=24,
        seq_len=32,
        device=device,
        **fields,
    )
    found = {}
    with closing(open_source(directory)) as source:
        selected = select(source.tensors.values())
        with closing(PrunedSource(source, options, selected)) as stream:
            for unit in plan_units(source.tensors.values(), selected):
                for tensor in unit.tensors:
                    raw = np.empty(tensor.nbytes, dtype=np.uint8)
                    stream.read_into(tensor.name, raw)
                    bits = raw.view(tensor.dtype.uint).reshape(tensor.shape)
                    found[tensor.name] = tensor_of(bits, tensor.dtype).clone()
    return {name: found[name] for name in selected}


@pytest.mark.parametrize("method", [name for name in METHODS if METHODS[name].calibrated])
@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_masks_are_those_of_the_cpu(model, method, pattern):
    host = pruned(model, method, "cpu", pattern=pattern)
    device = pruned(model, method, "cuda", pattern=pattern)
    assert host.keys() == device.keys()
    same = total = 0
    for name, wanted in host.items():
        found = device[name]
        assert torch.isfinite(found).all()
        assert int((found == 0).sum()) == int((wanted == 0).sum()), name
        same += int(((found == 0) == (wanted == 0)).sum())
        total += wanted.numel()
    assert same / total >= AGREEMENT[method]


@pytest.mark.parametrize("fields", [{"layer_sparsity": "owl"}, {"sequential": False}])
def test_other_ways_through_the_layers(model, fields):
    host = pruned(model, "wanda", "cpu", **fields)
    device = pruned(model, "wanda", "cuda", **fields)
    for name, wanted in host.items():
        agreement = ((device[name] == 0) == (wanted == 0)).float().mean()
        assert agreement > 0.99, name


def test_masks_are_held_on_the_device(model):
    found = AutoModelForCausalLM.from_pretrained(model).cuda()
    masks = {name: tensor != 0 for name, tensor in pruned(model, "wanda", "cuda").items()}
    ids = torch.randint(0, 256, (2, 16), device="cuda")
    optimizer = torch.optim.AdamW(found.parameters(), lr=1e-3, weight_decay=0.1)
    with hold_masks(found, masks) as held:
        for _ in range(3):
            optimizer.zero_grad()
            found(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
        assert held.sparsity == pytest.approx(0.5, abs=0.01)
    zeros = sum(int((value == 0).sum()) for value in found.state_dict().values())
    assert zeros >= sum(int((~mask).sum()) for mask in masks.values())
