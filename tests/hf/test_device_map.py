"""What a device map means to packed weights, and which readers go with which device."""

import pytest

from endor.errors import BackendError, ConfigError
from endor.hf import device_map as places
from endor.hf.device_map import DeviceMap, device_budget, open_reader_for, read_device_map

from ..support.fake_device import FakeDevice

NAMES = ["model.embed.weight", "model.layers.0.up.weight", "model.layers.1.up.weight", "lm_head.b"]


@pytest.fixture
def _devices(monkeypatch):
    """Every CUDA device can be used."""
    monkeypatch.setattr(places, "refuse", lambda device: None)


@pytest.mark.usefixtures("_devices")
def test_one_place_says_where_to_compute():
    for device, expected in (("cpu", []), ("cuda:1", ["cuda:1"]), (0, ["cuda:0"])):
        wanted = read_device_map({"": device})
        wanted.check(NAMES)
        assert wanted.devices() == expected
        assert wanted.tier_of("model.layers.0.up") is None
    assert read_device_map({"": "disk"}).tier_of("model.layers.0.up") == "disk"


@pytest.mark.usefixtures("_devices")
def test_entries_are_tiers():
    wanted = read_device_map({"model": 1, "model.layers.0": "cpu", "lm_head": "disk"})
    wanted.check(NAMES)
    assert wanted.devices() == ["cuda:1"]
    found = [wanted.tier_of(name) for name in NAMES]
    assert found == ["vram", "resident", "vram", "disk"]
    assert wanted.tier_of("model.layers.01.up") == "vram"


@pytest.mark.usefixtures("_devices")
def test_automatic_maps_use_the_devices_that_have_memory():
    for mode in places.AUTOMATIC:
        wanted = read_device_map(mode)
        wanted.limit({0: 5, 1: 0, 2: 7.5, "cpu": 9})
        assert wanted.limits == {"cuda:0": 5, "cuda:1": 0, "cuda:2": 7, "cpu": 9}
        assert wanted.devices() == ["cuda:0", "cuda:2"]
        assert wanted.tier_of("model") is None
    wanted = DeviceMap()
    wanted.limit({0: 5, "cpu": 9})
    assert wanted.devices() == [], "without a device map, the processor computes"


@pytest.mark.parametrize("limit", [-1, True, "6 potatoes", None])
def test_senseless_limits(limit):
    with pytest.raises(ConfigError, match=r"max_memory: 0 must have bytes"):
        read_device_map("auto").limit({0: limit})


def test_senseless_maps():
    with pytest.raises(ConfigError, match="device_map must be a map"):
        read_device_map({})
    with pytest.raises(ConfigError, match=r"'model\.lyers' is no module"):
        read_device_map({"": "cpu", "model.lyers": "disk"}).check(NAMES)
    with pytest.raises(ConfigError, match=r"gives no device for lm_head\.b"):
        read_device_map({"model": "cpu"}).check(NAMES)


def test_what_packed_weights_do_not_run_on():
    with pytest.raises(BackendError, match=r"device_map: model: .* CUDA devices, got 'mps'"):
        read_device_map({"": "mps"})
    with pytest.raises(BackendError, match="got 'cuda:one'"):
        read_device_map({"": "cuda:one"})
    wanted = read_device_map("auto")
    wanted.limit({99: 1 << 30})
    with pytest.raises(BackendError, match=r"max_memory: cuda:99: .*device_map='cpu'"):
        wanted.devices()


def test_budgets_of_a_device():
    device = FakeDevice(total_bytes=1000)
    kept = device.allocate(100)
    assert device_budget(device, None, None) == 800
    assert device_budget(device, None, 300) == 300
    assert device_budget(device, None, 1000) == 800
    assert device_budget(device, 950, 300) == 950, "vram is taken at the word"
    del kept
    assert device_budget(device, None, None) == 900


def test_readers_of_device_memory_need_a_device():
    with pytest.raises(BackendError, match="'cufile' reads into device memory"):
        open_reader_for("cufile", "cpu", [])
    with pytest.raises(ConfigError, match="reader must be one of"):
        open_reader_for("magic", "cpu", [])
    open_reader_for("buffered", "cpu", []).close()
