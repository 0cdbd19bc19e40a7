"""A whole mixture of experts, some of them in the memory of a simulated device, in turn."""

import random

import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

import endor
from endor.errors import BackendError
from endor.hf import device_map as places
from endor.hf.generation_cache import CACHE_ARGUMENT
from endor.planning.tiers import Exchanges, Placement

from ..support.fake_device import FakeDevice
from ..support.packed_files import loaders

pytestmark = pytest.mark.filterwarnings("ignore:You passed `quantization_config`")

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

SIZES = {
    "vocab_size": 211,
    "hidden_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "eos_token_id": None,
    "pad_token_id": 0,
    "initializer_range": 0.1,
    "num_experts_per_tok": 2,
    "experts_implementation": "eager",
}
KINDS = {
    "mixtral": transformers.MixtralConfig(**SIZES, intermediate_size=256, num_local_experts=6),
    "qwen3": transformers.Qwen3MoeConfig(
        **SIZES, intermediate_size=256, moe_intermediate_size=128, num_experts=8, head_dim=32
    ),
}


@pytest.fixture(scope="module", params=sorted(KINDS))
def checkpoint(request, tmp_path_factory):
    """A packed checkpoint, and the same model on the processor: with its bits, and fast."""
    folder = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(KINDS[request.param], dtype=torch.bfloat16)
    model.save_pretrained(folder / "source")
    endor.pack_checkpoint(
        folder / "source", folder / "packed", prune="magnitude", codec="raw", threads=1
    )
    path = folder / "packed"
    return path, {exact: endor.load_model(path, exact=exact) for exact in (True, False)}


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def patch(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(places, "refuse", lambda device: None)
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield patch


class Faulty(FakeDevice):
    """Copies of weights that fail when they are told to; links of any speed."""

    def __init__(self, rng: random.Random) -> None:
        super().__init__(
            total_bytes=1 << 30,
            bytes_per_s=10.0 ** rng.uniform(5, 9),
            latency_s=lambda: rng.choice([0.0, 1e-6, 1e-3]),
        )
        self.rng, self.share = rng, 0.0

    def copy(self, destination, source) -> None:
        if self.rng.random() < self.share:
            raise BackendError("the simulated link failed")
        super().copy(destination, source)


def load(patch, device: FakeDevice, path, **options):
    patch.setattr(places, "open_device", lambda name: device)
    return endor.load_model(path, device="cuda:0", context=64, prompt=16, kv="device", **options)


def check(model, on_cpu, *, exact: bool, tokens: int = 6) -> None:
    """Assert that a prompt and single tokens behind it give the processor's logits."""
    ids = torch.randint(1, 211, (1, 9 + tokens), generator=torch.Generator().manual_seed(1))
    caches = [
        {CACHE_ARGUMENT: transformers.DynamicCache(config=each.config)} for each in (model, on_cpu)
    ]
    with torch.no_grad():
        for part in (ids[:, :9], *ids[:, 9:].split(1, dim=1)):
            found = model(part, **caches[0]).logits
            expected = on_cpu(part, **caches[1]).logits
            if exact:
                assert torch.equal(found.view(torch.int16), expected.view(torch.int16))
            else:
                error = (found.float() - expected.float()).norm() / expected.float().norm()
                assert error < 0.02


@pytest.mark.parametrize("exact", [True, False])
def test_a_plan_lets_experts_change_places(checkpoint, patch, exact):
    path, on_cpu = checkpoint
    device = FakeDevice(total_bytes=1 << 30, bytes_per_s=1e9)
    whole = load(patch, device, path, exact=exact)
    assert whole.endor_plan.exchanges is None  # all of it fits
    fixed = sum(i.nbytes for i in whole.endor_plan.reservations if i.where == "vram")
    units = whole.endor.units
    whole.endor.close()
    least = sum(unit.nbytes for unit in units if unit.scheduled)
    routed = sum(unit.nbytes for unit in units if not unit.scheduled)
    slots = 3 * max(unit.nbytes for unit in units)
    vram = fixed + least + slots + routed // 2
    model = load(patch, device, path, vram=vram, exact=exact)
    assert model.endor_plan.exchanges is not None
    model.endor.preload()
    mover = model.endor.movers[0]
    for _ in range(3):
        check(model, on_cpu[exact], exact=exact)
        mover.hot.settle()
    counters = model.endor.ledger.counters
    assert 0 < counters.hot_hits < counters.hot_uses
    assert counters.exchanges >= mover.hot.report()["homes"] > 0
    assert mover.vram_bytes + fixed <= vram
    assert device.errors == []
    model.endor.close()
    assert device.pinned_bytes == 0


def test_lossy_experts_are_those_in_vram(checkpoint, patch):
    """First choices apart, an expert outside VRAM gives its place to one that is there."""
    path, on_cpu = checkpoint
    device = FakeDevice(total_bytes=1 << 30)
    units = on_cpu[False].endor.units
    tiers = {unit.name: "vram" if unit.scheduled or unit.index % 2 else "host" for unit in units}
    placement = Placement(tiers, 0, 2, exchanges=Exchanges(10.0, 1 << 20))
    model = load(patch, device, path, exact=False, placement=placement, experts="lossy")
    model.endor.preload()
    mover, counters = model.endor.movers[0], model.endor.ledger.counters
    near = {state.unit.name for state in mover.states.values() if mover.near(state)}
    assert {unit.name for unit in units if unit.scheduled} <= near
    cache = {CACHE_ARGUMENT: transformers.DynamicCache(config=model.config)}
    with torch.no_grad():
        for token in range(1, 9):
            assert model(torch.tensor([[token]]), **cache).logits.isfinite().all()
    layers, top_k = model.config.num_hidden_layers, SIZES["num_experts_per_tok"]
    assert counters.lossy_choices == 8 * layers * top_k
    assert 0 < counters.lossy_replaced < counters.lossy_choices
    assert counters.hot_uses >= counters.lossy_choices  # what routers chose counts as used
    assert device.errors == []
    model.endor.close()


@settings(
    max_examples=10,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(seed=st.integers(0, 2**32), fails=st.booleans(), exact=st.booleans())
def test_random_places_latencies_and_failures(checkpoint, patch, seed, fails, exact):
    path, on_cpu = checkpoint
    rng, threads = random.Random(seed), loaders()
    device = Faulty(rng)
    elsewhere = rng.choice(["host", "resident"]) if not exact else "resident"
    tiers = {
        unit.name: rng.choice(["vram", elsewhere]) if unit.scheduled else elsewhere
        for unit in on_cpu[exact].endor.units
    }
    routed = [unit.name for unit in on_cpu[exact].endor.units if not unit.scheduled]
    tiers |= dict.fromkeys(rng.sample(routed, rng.randint(1, len(routed) - 1)), "vram")
    exchanges = Exchanges(10.0 ** rng.uniform(-1, 2), rng.choice([1 << 14, 1 << 20]))
    placement = Placement(tiers, 0, rng.randint(1, 4), exchanges=exchanges)
    model = load(patch, device, path, exact=exact, placement=placement)
    mover = model.endor.movers[0]
    given_bytes = sum(u.nbytes for u in model.endor.units if tiers[u.name] == "vram")
    try:
        for share in (0.2 if fails else 0.0, 0.0):
            device.share = share
            try:
                check(model, on_cpu[exact], exact=exact, tokens=4)
            except BackendError:
                assert share
                mover.drop()
            assert mover.vram_bytes - mover.slot_bytes <= given_bytes
        assert device.errors == []
    finally:
        model.endor.close()
    assert device.pinned_bytes == 0
    assert loaders() <= threads
