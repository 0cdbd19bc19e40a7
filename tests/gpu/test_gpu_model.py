"""Packed models on a real device: the bits of the dense model on the same device."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

import endor
from endor.offload.copier import Copier
from endor.offload.device import CudaDevice, allocate_for_copies
from endor.planning.tiers import Placement
from endor.storage import HostBuffer

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


_MADE: dict[str, tuple[Path, Any]] = {}


@pytest.fixture(params=sorted(KINDS))
def checkpoint(request, tmp_path_factory):
    """A packed checkpoint, half of it pruned, and the dense model with the same weights."""
    kind = request.param
    if kind not in _MADE:
        folder = tmp_path_factory.mktemp(kind)
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(KINDS[kind], dtype=torch.bfloat16)
        model.save_pretrained(folder / "source")
        endor.pack_checkpoint(folder / "source", folder / "packed", prune="magnitude")
        endor.unpack_checkpoint(folder / "packed", folder / "dense")
        dense = AutoModelForCausalLM.from_pretrained(
            folder / "dense", experts_implementation="eager", device_map="cuda"
        )
        _MADE[kind] = (folder / "packed", dense)
    return _MADE[kind]


def agree(model, dense) -> None:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, 1031, (2, 17), generator=generator).cuda()
    with torch.no_grad():
        expected = dense(ids).logits
        for _ in range(3):
            assert torch.equal(model(ids).logits, expected)
    text = model.generate(ids, max_new_tokens=12, do_sample=False)
    assert torch.equal(text, dense.generate(ids, max_new_tokens=12, do_sample=False))


def test_every_placement_gives_the_bits_of_the_dense_model(checkpoint):
    """All in VRAM; half of it in locked RAM; then half of that on disk; then one slot alone."""
    path, dense = checkpoint
    model = endor.load_model(path, device="cuda")
    agree(model, dense)
    store = model.endor
    assert set(store.report()["tiers"]) <= {"vram", "vram-dense"}
    packed, largest = store.packed_nbytes, max(unit.nbytes for unit in store.units)
    fixed = sum(
        item.nbytes for item in model.endor_plan.reservations if item.what != "device slots"
    )
    store.close()
    for vram, ram, tiers in (
        (packed // 2 + 3 * largest, packed, {"vram", "resident"}),
        (packed // 4 + 3 * largest, packed // 3 + 2 * largest, {"vram", "resident", "disk"}),
        (largest, 2 * largest, {"disk"}),
    ):
        model = endor.load_model(path, device="cuda", vram=fixed + vram, ram=ram)
        agree(model, dense)
        report = model.endor.report()
        assert tiers <= set(report["tiers"])
        assert report["pageable_bytes"] == 0
        assert report["copier"]["failures"] == 0
        assert model.endor.movers[0].vram_bytes <= vram
        model.endor.close()


def test_packed_products_agree_up_to_rounding(checkpoint):
    path, dense = checkpoint
    model = endor.load_model(path, device="cuda", exact=False)
    ids = torch.randint(1, 1031, (1, 1), generator=torch.Generator().manual_seed(2)).cuda()
    with torch.no_grad():
        found, expected = model(ids).logits.float(), dense(ids).logits.float()
    assert float((found - expected).abs().max() / expected.abs().max()) < 0.05
    model.endor.close()


@pytest.mark.parametrize("share", [1.0, 0.5])
def test_the_host_multiplies_beside_the_device(checkpoint, share):
    """Every unit on the host, or half of its rows: the processor's logits, and no copy missed."""
    path, dense = checkpoint
    names = [unit.name for unit in endor.load_model(path).endor.units]
    tiers: dict[str, Any] = dict.fromkeys(names, "host")
    placement = Placement(tiers, 0, 3, dict.fromkeys(names, share))
    model = endor.load_model(path, device="cuda", exact=False, placement=placement)
    ids = torch.randint(1, 1031, (1, 12), generator=torch.Generator().manual_seed(2)).cuda()
    with torch.no_grad():
        for tokens in (1, 4, 12):
            found = model(ids[:, :tokens]).logits.float()
            expected = dense(ids[:, :tokens]).logits.float()
            assert float((found - expected).abs().max() / expected.abs().max()) < 0.05
    assert model.endor.ledger.counters.host_products > 0
    assert model.endor.report()["pageable_bytes"] == 0
    text = model.generate(ids, max_new_tokens=8, do_sample=False)
    assert text.shape == (1, 20)
    model.endor.close()


def test_what_a_step_asks_of_resident_weights_can_be_captured(checkpoint, monkeypatch, tmp_path):
    """Products and expansions after a first run, and the same ones outside the graph again."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path, _ = checkpoint
    model = endor.load_model(path, device="cuda", exact=False)
    weights = [weight for weight in model.endor.weights.values() if weight.product_rows]
    assert weights
    inputs = [
        torch.randn(1, weight.shape[1], device="cuda").to(torch.bfloat16) for weight in weights
    ]

    def step() -> list[torch.Tensor]:
        found = []
        for weight, x in zip(weights, inputs, strict=True):
            found += [weight.product(x), weight.dense().sum(dtype=torch.float32)]
        return found

    expected = step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for _ in range(2):
        graph.replay()
        for found, wanted in zip(captured, expected, strict=True):
            assert torch.equal(found, wanted)
    for found, wanted in zip(step(), expected, strict=True):
        assert torch.equal(found, wanted)
    model.endor.close()


def test_the_device_times_work_and_knows_a_capture():
    device = CudaDevice("cuda")
    big, small = (torch.ones(size, size, device="cuda") for size in (4096, 64))
    assert 0 < device.seconds(lambda: torch.mm(small, small)) < 1
    assert device.seconds(lambda: torch.mm(big, big)) > device.seconds(lambda: small.add_(1))
    assert not device.capturing()
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        assert device.capturing()
        small.add_(1)
    assert device.facts()["card"] == torch.cuda.get_device_name()


def test_the_device_copies_what_it_is_told():
    """The copier over a real stream: every slot holds its unit's bytes when they are used."""
    device = CudaDevice("cuda")
    units = [torch.randint(0, 255, (1 << 20,), dtype=torch.uint8) for _ in range(7)]
    buffers = [HostBuffer(1 << 20) for _ in units]  # each owns its pages
    arrays = [buffer.array for buffer in buffers]
    for array, unit in zip(arrays, units, strict=True):
        array[:] = unit.numpy()
    assert all(device.pin(array) is None for array in arrays)

    class Source:
        def acquire(self, unit: int):
            return [(0, arrays[unit][: 1 << 19]), (1 << 19, arrays[unit][1 << 19 :])]

        def issued(self, unit: int, event) -> None:
            pass

        def reads_directly(self, unit: int) -> bool:
            return False

    copier = Copier(
        device, Source(), [allocate_for_copies(device, 1 << 20) for _ in range(3)], range(7)
    )
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
