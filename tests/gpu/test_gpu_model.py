"""Packed models on a real device: the bits of the dense model on the same device."""

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

import endor
from endor.offload.copier import Copier
from endor.offload.device import CudaDevice

pytestmark = pytest.mark.gpu

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

SIZES = {
    "vocab_size": 1031,
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 256,
    "initializer_range": 0.1,
    "eos_token_id": None,
    "pad_token_id": 0,
}
KINDS = {
    "llama": transformers.LlamaConfig(**SIZES),
    "mixtral": transformers.MixtralConfig(
        **SIZES, num_local_experts=6, num_experts_per_tok=2, experts_implementation="eager"
    ),
}


@pytest.fixture(scope="module", params=sorted(KINDS))
def checkpoint(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(KINDS[request.param], dtype=torch.bfloat16)
    model.save_pretrained(folder / "source")
    endor.pack_checkpoint(folder / "source", folder / "packed", prune="magnitude")
    endor.unpack_checkpoint(folder / "packed", folder / "dense")
    dense = AutoModelForCausalLM.from_pretrained(
        folder / "dense", experts_implementation="eager", device_map="cuda"
    )
    return folder / "packed", dense


@pytest.mark.parametrize(
    ("vram", "ram"),
    [(None, None), ("3MiB", "1GiB"), ("2200KiB", "600KiB")],
    ids=["all in VRAM", "VRAM and RAM", "VRAM, RAM and disk"],
)
def test_logits_and_text_are_those_of_the_dense_model(checkpoint, vram, ram):
    path, dense = checkpoint
    if vram is not None:
        vram = int(vram.rstrip("KMiB")) * (1024 if "K" in vram else 1 << 20)
        vram += sum(item.numel() * item.element_size() for item in dense.parameters()) // 2
    model = endor.load_model(path, device="cuda", vram=vram, ram=ram)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, 1031, (2, 17), generator=generator).cuda()
    with torch.no_grad():
        expected = dense(ids).logits
        for _ in range(3):
            assert torch.equal(model(ids).logits, expected)
    text = model.generate(ids, max_new_tokens=12, do_sample=False)
    assert torch.equal(text, dense.generate(ids, max_new_tokens=12, do_sample=False))
    report = model.endor.report()
    assert report["pageable_bytes"] == 0
    if vram is None:
        assert set(report["tiers"]) == {"vram"}
    model.endor.close()


def test_the_device_copies_what_it_is_told():
    """The copier over a real stream: every slot holds its unit's bytes when they are used."""
    device = CudaDevice("cuda")
    units = [torch.randint(0, 255, (1 << 20,), dtype=torch.uint8) for _ in range(7)]
    arrays = [unit.numpy() for unit in units]
    assert all(device.pin(array) is None for array in arrays)

    class Source:
        def acquire(self, unit: int):
            return arrays[unit]

        def issued(self, unit: int, event) -> None:
            pass

        def reads_directly(self, unit: int) -> bool:
            return False

    copier = Copier(device, Source(), [device.allocate(1 << 20) for _ in range(3)], range(7))
    expected = [unit.cuda() for unit in units]
    wrong = torch.zeros((), dtype=torch.int64, device="cuda")
    for turn in range(20):
        for unit in range(7) if turn % 3 else (5, 1, 1, 6, 0):
            slot = copier.take(unit)
            wrong += (slot.buffer != expected[unit]).sum()
            copier.release(slot)
    assert int(wrong) == 0
    copier.close()
    device.drain()
    for array in arrays:
        device.unpin(array)
