"""Whole models over the simulated device: the logits of the dense model, bit for bit."""

import gc
import re
import threading

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

import endor
from endor.errors import BudgetError
from endor.hf import device_map as places
from endor.offload.device_mover import DeviceMover
from endor.offload.weight import KeptWeight

from ..support.fake_device import FakeDevice

# transformers warns of every quantization config that adds to the checkpoint's own.
pytestmark = pytest.mark.filterwarnings("ignore:You passed `quantization_config`")

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


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """Tiny products gain nothing from threads, and lose much where other processes run too."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def devices(monkeypatch, tmp_path) -> list[FakeDevice]:
    """Simulated devices stand in for CUDA's, in the order in which they are opened."""
    opened: list[FakeDevice] = []

    def open_device(name: str) -> FakeDevice:
        opened.append(FakeDevice(total_bytes=1 << 30))
        return opened[-1]

    monkeypatch.setattr(places, "open_device", open_device)
    monkeypatch.setattr(places, "refuse", lambda device: None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return opened


def prompt() -> torch.Tensor:
    return torch.randint(1, 211, (2, 9), generator=torch.Generator().manual_seed(1))


def check(model, dense) -> None:
    """Assert that logits and text are the dense model's, and that no copy went wrong."""
    ids = prompt()
    with torch.no_grad():
        expected = dense(ids).logits
        for _ in range(2):
            assert torch.equal(model(ids).logits, expected)
    text = model.generate(ids, max_new_tokens=6, do_sample=False)
    assert torch.equal(text, dense.generate(ids, max_new_tokens=6, do_sample=False))
    for mover in model.endor.movers:
        assert mover.device.errors == []


def least(path, **budgets) -> int:
    """Return the least budget that the refusal names."""
    with pytest.raises(BudgetError, match="budget must be at least") as error:
        endor.load_model(path, device="cuda:0", context=64, prompt=16, **budgets)
    found = re.search(r"\((\d+) bytes\)", str(error.value))
    assert found is not None
    return int(found[1])


def load(path, **options):
    return endor.load_model(path, device="cuda:0", context=64, prompt=16, batch=2, **options)


def held(device: FakeDevice, model) -> int:
    """Bytes on a simulated device: what it allocated, and what is kept expanded."""
    kept = sum(
        weight.kept.numel() * weight.kept.element_size()
        for weight in model.endor.weights.values()
        if isinstance(weight, KeptWeight) and weight.kept is not None
    )
    return device.allocated_bytes + kept


@pytest.mark.parametrize("share", [0.0, 0.3, 0.6, 1.0, 3.0])
def test_plans_come_true_within_their_budgets(devices, checkpoint, share):
    """Whatever VRAM there is beyond the least, the bits are right and the memory is kept."""
    path, dense = checkpoint
    whole = load(path)
    assert set(whole.endor_plan.tiers.values()) <= {"vram", "vram-dense"}
    packed = whole.endor.packed_nbytes
    whole.endor.close()
    fixed = sum(
        item.nbytes for item in whole.endor_plan.reservations if item.what != "device slots"
    )
    largest = max(unit.nbytes for unit in whole.endor.units)
    vram = fixed + largest + int(share * packed)
    model = load(path, vram=vram, ram=max(2 * largest, packed // 2))
    check(model, dense)
    plan, store = model.endor_plan, model.endor
    assert isinstance(store.movers[0], DeviceMover)
    assert dict(store.placement.tiers) == dict(plan.tiers)
    cache = {item.what: item.nbytes for item in plan.reservations}
    elsewhere = sum(
        cache[what] for what in ("cache of keys and values", "weights outside the units")
    )
    assert held(devices[-1], model) + elsewhere <= vram
    assert ("copier" in store.report()) == (plan.slots > 0)
    if share == 0.0:
        assert not [tier for tier in plan.tiers.values() if tier.startswith("vram")]
        assert "disk" in plan.tiers.values()
    store.close()


def test_the_least_budget_is_named_and_works(devices, checkpoint):
    path, dense = checkpoint
    need = least(path, vram=1)
    model = endor.load_model(path, device="cuda:0", context=64, prompt=16, vram=need)
    check(model, dense)
    model.endor.close()
    with pytest.raises(BudgetError, match="the vram budget"):
        endor.load_model(path, device="cuda:0", context=64, prompt=16, vram=need - 1)
    ram = least(path, ram=1)
    check(endor.load_model(path, device="cuda:0", context=64, prompt=16, ram=ram), dense)


def test_limits_and_maps_as_in_accelerate(monkeypatch, devices, checkpoint):
    path, dense = checkpoint
    need = least(path, vram=1)
    model = AutoModelForCausalLM.from_pretrained(
        path,
        device_map="auto",
        max_memory={0: need, "cpu": "1GiB"},
        quantization_config=endor.hf.EndorConfig(context=64, prompt=16),
        experts_implementation="eager",
    )
    assert model.endor_plan.vram_bytes == need
    assert model.endor_plan.ram_bytes == 1 << 30
    assert "resident" in model.endor_plan.tiers.values()
    check(model, dense)
    places = {"": 0, "model.layers.1": "cpu", "model.layers.2": "disk"}
    model = AutoModelForCausalLM.from_pretrained(
        path, device_map=places, experts_implementation="eager"
    )
    for name, weight in model.endor.weights.items():
        layer = name.split(".")[2]
        tiers = {model.endor_plan.tiers[state.unit.name] for state in weight.states}
        assert tiers == {{"0": "vram", "1": "resident", "2": "disk"}[layer]}
    check(model, dense)
    assert not any(hasattr(module, "_hf_hook") for module in model.modules())
    only_cpu = AutoModelForCausalLM.from_pretrained(
        path, device_map="auto", max_memory={"cpu": "1GiB"}, experts_implementation="eager"
    )
    assert not isinstance(only_cpu.endor.movers[0], DeviceMover)


@pytest.mark.parametrize("mode", ["auto", "balanced", "balanced_low_0", "sequential"])
def test_ranges_of_layers_on_several_devices(devices, checkpoint, mode):
    path, dense = checkpoint
    model = AutoModelForCausalLM.from_pretrained(
        path,
        device_map=mode,
        max_memory={0: 80 << 20, 1: 80 << 20, 2: 80 << 20, "cpu": "1GiB"},
        quantization_config=endor.hf.EndorConfig(context=64, prompt=16),
        experts_implementation="eager",
    )
    if mode in ("sequential", "balanced_low_0"):
        assert len(model.endor.shares) in (1, 2)
    else:
        assert len(model.endor.shares) > 1
        owners = {name: at for at, share in enumerate(model.endor.shares) for name in share.weights}
        order = [owners[name] for name in sorted(owners, key=lambda name: name.split(".")[2])]
        assert order == sorted(order)
        assert set(order) == {0, 1, 2}
    check(model, dense)
    assert model.endor.report()["tiers"]
    model.endor.close()


def test_a_map_over_several_devices(devices, checkpoint):
    path, dense = checkpoint
    others = set(threading.enumerate())
    model = AutoModelForCausalLM.from_pretrained(
        path,
        device_map={
            "model.embed_tokens": 0,
            "model.layers.0": 0,
            "model.layers.1": 1,
            "model.layers.2": "cpu",
            "model.norm": 1,
            "lm_head": 1,
        },
        quantization_config=endor.hf.EndorConfig(context=64, prompt=16),
        experts_implementation="eager",
    )
    first, second = model.endor.shares
    assert {name.split(".")[2] for name in first.weights} == {"0", "2"}
    assert {name.split(".")[2] for name in second.weights} == {"1"}
    assert set(second.placement.tiers.values()) == {"vram"}
    check(model, dense)
    started = {
        thread for thread in set(threading.enumerate()) - others if thread.name.startswith("endor-")
    }
    assert started
    gc.collect()
    gc.disable()
    try:
        del model, first, second
        assert [device.allocated_bytes for device in devices] == [0, 0]
    finally:
        gc.enable()
    assert not [thread for thread in started if thread.is_alive()]


class Clock(FakeDevice):
    """Computing waits for the clock where it waits for an event: torch does not wait here."""

    def await_in_compute(self, event) -> None:
        super().await_in_compute(event)
        self.synchronize(event)


@pytest.mark.parametrize("kv", ["ram", "disk"])
@pytest.mark.parametrize("beams", [1, 3])
def test_keys_and_values_outside_the_device(monkeypatch, devices, checkpoint, kv, beams):
    """They come back layer by layer beside the weights, bit for bit."""
    path, dense = checkpoint
    device = Clock(total_bytes=1 << 30)
    monkeypatch.setattr(places, "open_device", lambda name: device)
    model = load(path, kv=kv)
    assert model.endor_plan.workload.kv == kv
    ids, options = prompt(), {"max_new_tokens": 8, "do_sample": False, "num_beams": beams}
    assert torch.equal(model.generate(ids, **options), dense.generate(ids, **options))
    counters = model.endor.ledger.counters
    assert counters.kv_load_bytes > 0
    assert counters.kv_save_bytes > 0
    kinds = {event.kind for event in model.endor.ledger.events}
    assert {"kv load", "kv save"} <= kinds
    assert device.errors == []
    model.endor.close()
