"""Whole models over the simulated device: the logits of the dense model, bit for bit."""

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

import endor
from endor import codecs
from endor.hf import quantizer
from endor.offload.device_placement import spread_on_device
from endor.offload.device_store import DeviceStore
from endor.offload.fake_device import FakeDevice

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

SIZES = {
    "vocab_size": 211,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "eos_token_id": None,
    "pad_token_id": 0,
}
KINDS = {
    "llama": transformers.LlamaConfig(**SIZES),
    "mixtral": transformers.MixtralConfig(
        **SIZES, num_local_experts=6, num_experts_per_tok=2, experts_implementation="eager"
    ),
}


class Expansion:
    """Stands in for the kernels: decodes on the CPU what the simulated device holds."""

    def __init__(self, device: FakeDevice, items) -> None:
        self.device = device
        self.items = items

    def run(self) -> None:
        self.device.drain()
        for packed, out in self.items:
            storage = packed.storage.numpy()
            arrays = {
                array.suffix: storage[packed.offsets[array.suffix] :][: array.nbytes]
                .view(array.dtype.uint)
                .reshape(array.shape)
                for array in packed.spec.arrays
            }
            bits = codecs.decode(codecs.Encoded(packed.spec, arrays)).reshape(-1)
            signed = torch.from_numpy(bits.view(f"i{bits.itemsize}"))
            out.view(-1).view(signed.dtype).copy_(signed)


@pytest.fixture(scope="module", params=sorted(KINDS))
def checkpoint(request, tmp_path_factory):
    """A packed checkpoint, half of it pruned, and the dense model with the same weights."""
    folder = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(KINDS[request.param], dtype=torch.bfloat16)
    model.save_pretrained(folder / "source")
    endor.pack_checkpoint(folder / "source", folder / "packed", prune="magnitude", threads=1)
    endor.unpack_checkpoint(folder / "packed", folder / "dense")
    dense = AutoModelForCausalLM.from_pretrained(folder / "dense", experts_implementation="eager")
    for parameter in dense.parameters():
        parameter.data = parameter.data.clone()
    return folder / "packed", dense


@pytest.mark.parametrize(
    ("vram", "ram", "slots"), [(1.0, 1.0, 3), (0.5, 1.0, 3), (0.4, 0.4, 2), (0.0, 0.1, 1)]
)
def test_logits_have_the_bits_of_the_dense_model(monkeypatch, checkpoint, vram, ram, slots):
    path, dense = checkpoint

    def store_on_device(layouts, units, specs, placement, reader, **options):
        total = sum(unit.nbytes for unit in units)
        largest = max(unit.nbytes for unit in units)
        device = FakeDevice()
        return DeviceStore(
            layouts,
            units,
            specs,
            spread_on_device(
                units,
                vram_bytes=max(int(vram * total), slots * largest),
                ram_bytes=max(int(ram * total), 2 * largest),
                slots=slots,
            ),
            reader,
            device=device,
            prepare=lambda items: Expansion(device, items),
            **options,
        )

    monkeypatch.setattr(quantizer, "Store", store_on_device)
    model = endor.load_model(path, threads=1)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, 211, (2, 9), generator=generator)
    with torch.no_grad():
        expected = dense(ids).logits
        for _ in range(2):
            assert torch.equal(model(ids).logits, expected)
    text = model.generate(ids, max_new_tokens=6, do_sample=False)
    assert torch.equal(text, dense.generate(ids, max_new_tokens=6, do_sample=False))
    store = model.endor
    assert isinstance(store, DeviceStore)
    assert store.device.errors == []
    assert ("copier" in store.report()) == (vram < 1)
    store.close()
