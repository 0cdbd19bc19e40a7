"""Whole models whose weights in RAM the host multiplies beside the simulated device."""

import contextlib
import random

import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

import endor
from endor.errors import BackendError, ConfigError, EndorError, ReadError
from endor.hf import device_map as places
from endor.hf import placing
from endor.hf.generation_cache import CACHE_ARGUMENT
from endor.planning.tiers import Placement
from endor.storage import open_reader

from ..support.fake_device import FakeDevice
from ..support.packed_files import Disk, loaders

pytestmark = pytest.mark.filterwarnings("ignore:You passed `quantization_config`")

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

SIZES = {
    "vocab_size": 211,
    "hidden_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "eos_token_id": None,
    "pad_token_id": 0,
}
LLAMA = SIZES | {"intermediate_size": 256, "num_key_value_heads": 2, "initializer_range": 0.1}
KINDS = {
    "llama": transformers.LlamaConfig(**LLAMA),
    "mixtral": transformers.MixtralConfig(
        **LLAMA, num_local_experts=6, num_experts_per_tok=2, experts_implementation="eager"
    ),
    "opt": transformers.OPTConfig(**SIZES, ffn_dim=256, word_embed_proj_dim=128, init_std=0.1),
}


@pytest.fixture(scope="module", params=sorted(KINDS))
def checkpoint(request, tmp_path_factory):
    """A packed checkpoint, half of it pruned, and the same model on the processor alone."""
    folder = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(KINDS[request.param], dtype=torch.bfloat16)
    model.save_pretrained(folder / "source")
    endor.pack_checkpoint(
        folder / "source", folder / "packed", prune="magnitude", codec="raw", threads=1
    )
    return folder / "packed", endor.load_model(folder / "packed", exact=False)


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def device(monkeypatch, tmp_path) -> FakeDevice:
    """A simulated device stands in for CUDA's."""
    found = FakeDevice(total_bytes=1 << 30, bytes_per_s=1e8, latency_s=lambda: 1e-5)
    monkeypatch.setattr(places, "open_device", lambda name: found)
    monkeypatch.setattr(places, "refuse", lambda device: None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return found


def load(path, **options):
    return endor.load_model(
        path, device="cuda:0", context=64, prompt=16, exact=False, kv="device", **options
    )


def close_to(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Assert that logits differ by roundings of bfloat16 alone, as many as the layers make."""
    error = (found.float() - expected.float()).norm() / expected.float().norm()
    assert error < 0.02


def check(model, on_cpu, *, tokens: int = 5) -> None:
    """Assert that a prompt and some single tokens behind it give the processor's logits."""
    ids = torch.randint(1, 211, (1, 9 + tokens), generator=torch.Generator().manual_seed(1))
    caches = [cached(model), cached(on_cpu)]
    with torch.no_grad():
        for part in (ids[:, :9], *ids[:, 9:].split(1, dim=1)):
            found, expected = model(part, **caches[0]), on_cpu(part, **caches[1])
            close_to(found.logits, expected.logits)


def cached(model) -> dict:
    """Return a new cache as the argument that transformers takes it by."""
    return {CACHE_ARGUMENT: transformers.DynamicCache(config=model.config)}


def test_a_plan_gives_units_to_the_host(device, checkpoint):
    path, on_cpu = checkpoint
    whole = load(path)
    assert whole.endor_plan.count("host") == 0  # all of it fits
    fixed = sum(i.nbytes for i in whole.endor_plan.reservations if i.where == "vram")
    whole.endor.close()
    largest = max(unit.nbytes for unit in whole.endor.units)
    model = load(path, vram=fixed + 4 * largest, host_compute="on")
    assert model.endor_plan.count("host") > 0
    assert model.endor_plan.way != "stream"
    assert dict(model.endor.placement.tiers) == dict(model.endor_plan.tiers)
    check(model, on_cpu)
    counters = model.endor.ledger.counters
    assert counters.host_products > 0
    assert device.errors == []
    model.endor.close()
    off = load(path, vram=fixed + 4 * largest, host_compute="off")
    check(off, on_cpu, tokens=2)
    assert off.endor.ledger.counters.host_products == 0
    off.endor.close()


def test_queries_keys_and_values_share_a_trip(device, checkpoint):
    path, _ = checkpoint
    names = [unit.name for unit in endor.load_model(path).endor.units]
    model = load(path, placement=Placement(dict.fromkeys(names, "host"), 0, 1))
    store = model.endor
    with torch.no_grad():
        cache = cached(model)
        model(torch.tensor([[1] * 16]), **cache)
        before, trips = store.ledger.snapshot(), store.movers[0].exchange.trips
        model(torch.tensor([[5]]), **cache)
    trips = store.movers[0].exchange.trips - trips
    products = store.ledger.since(before)["host_products"]
    kind = model.config.model_type
    layers, experts = 3, 2
    # q k v | o | gate up | down; of two experts gate, up and down; q k v | o | fc1 | fc2.
    if kind == "llama":
        assert (products, trips) == (layers * 7, layers * 4)
    elif kind == "opt":
        assert (products, trips) == (layers * 6, layers * 4)
    else:
        assert products == layers * (4 + 3 * experts)
        assert trips <= layers * (2 + 2 * experts)
    store.close()


def test_an_expert_is_computed_where_it_lies_for_few_tokens_and_copied_for_many(device, checkpoint):
    path, on_cpu = checkpoint
    if on_cpu.config.model_type != "mixtral":
        pytest.skip("has no experts")
    units = on_cpu.endor.units
    experts = [unit for unit in units if not unit.scheduled]
    tiers = {unit.name: "vram" if unit.scheduled else "host" for unit in units}
    model = load(path, placement=Placement(tiers, 0, 2))
    store = model.endor
    with torch.no_grad():
        for tokens, copied in ((2, False), (96, True)):
            ids = torch.randint(1, 211, (1, tokens), generator=torch.Generator().manual_seed(2))
            before, copies = store.ledger.snapshot(), store.report()["copier"]["copies"]
            close_to(model(ids).logits, on_cpu(ids).logits)
            copies = store.report()["copier"]["copies"] - copies
            products = store.ledger.since(before)["host_products"]
            assert (copies > 0) == copied
            assert (products > 0) or copied
            assert copies <= len(experts)
    assert device.errors == []
    store.close()


def test_text_is_made(device, checkpoint):
    path, on_cpu = checkpoint
    names = [unit.name for unit in on_cpu.endor.units]
    model = load(path, placement=Placement(dict.fromkeys(names, "host"), 0, 2))
    ids = torch.tensor([[3, 7, 11, 20]])
    text = model.generate(ids, max_new_tokens=6, do_sample=False)
    assert text.shape == (1, 10)
    products = model.endor.ledger.counters.host_products
    assert 0 < model.endor.movers[0].exchange.trips < 0.8 * products
    assert device.errors == []
    model.endor.close()


def test_exact_models_use_the_device_alone(device, checkpoint):
    path, on_cpu = checkpoint
    names = [unit.name for unit in on_cpu.endor.units]
    model = endor.load_model(
        path, device="cuda:0", placement=Placement(dict.fromkeys(names, "host"), 0, 2)
    )
    exact = endor.load_model(path)
    ids = torch.tensor([[3, 7, 11, 20]])
    with torch.no_grad():
        assert torch.equal(model(ids[:, :1]).logits, exact(ids[:, :1]).logits)
    assert model.endor.ledger.counters.host_products == 0
    model.endor.close()
    with pytest.raises(ConfigError, match="exact=False"):
        endor.load_model(path, device="cuda:0", host_compute="on")


def test_on_without_a_device_is_refused(checkpoint):
    with pytest.raises(ConfigError, match="CUDA device"):
        endor.load_model(checkpoint[0], exact=False, host_compute="on")


class Faulty(FakeDevice):
    """A device whose copies of activations fail when they are told to, and take random times."""

    def __init__(self, rng: random.Random) -> None:
        super().__init__(
            total_bytes=1 << 30,
            bytes_per_s=10.0 ** rng.uniform(5, 9),
            latency_s=lambda: rng.choice([0.0, 1e-6, 1e-3]),
        )
        self.rng = rng
        self.share = 0.0

    def fail(self) -> None:
        if self.rng.random() < self.share:
            raise BackendError("the simulated link failed")

    def copy_down(self, destination, source) -> None:
        self.fail()
        super().copy_down(destination, source)

    def copy_up(self, destination, source) -> None:
        self.fail()
        super().copy_up(destination, source)


@settings(
    max_examples=12,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(seed=st.integers(0, 2**32), fails=st.booleans())
def test_random_splits_latencies_and_failures(checkpoint, monkeypatch_module, seed, fails):
    path, on_cpu = checkpoint
    rng = random.Random(seed)
    device, disk = Faulty(rng), Disk()
    monkeypatch_module.setattr(places, "open_device", lambda name: device)
    monkeypatch_module.setattr(places, "refuse", lambda device: None)
    monkeypatch_module.setattr(
        placing, "open_reader_for", lambda *_: open_reader("buffered", preadv=disk)
    )
    units = on_cpu.endor.units
    tiers = {unit.name: rng.choice(["host", "host", "host", "resident", "vram"]) for unit in units}
    if rng.random() < 0.5:
        tiers |= {unit.name: "disk" for unit in units if rng.random() < 0.2}
    shares = {
        name: rng.choice([0.0, 1.0, rng.random(), rng.random()])
        for name in tiers
        if rng.random() < 0.8
    }
    staging = 3 * max(unit.nbytes for unit in units) if "disk" in tiers.values() else 0
    threads = loaders()
    model = load(path, placement=Placement(tiers, staging, rng.randint(1, 4), shares))
    try:
        if fails:
            device.share, disk.failures = 0.2, rng.choice([0, 2])
            with contextlib.suppress(EndorError):
                check(model, on_cpu)
            device.share = disk.failures = 0
        for _ in range(3):
            try:
                check(model, on_cpu, tokens=3)
                break
            except ReadError:  # of a read ahead that had failed before
                continue
        else:
            raise AssertionError("the reads go on failing")
        assert device.errors == []
    finally:
        model.endor.close()
    assert device.pinned_bytes == 0
    assert loaders() <= threads


@pytest.fixture(scope="module")
def monkeypatch_module():
    with pytest.MonkeyPatch.context() as patch:
        yield patch
