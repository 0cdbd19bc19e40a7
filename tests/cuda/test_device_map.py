"""What a device map means to packed weights, and which readers go with which device."""

import pytest

from endor.errors import BackendError, ConfigError
from endor.hf.device import open_reader_for, read_device_map


def test_one_device_and_wishes():
    assert read_device_map({"": "cpu"}) == ("cpu", {})
    assert read_device_map({"": "disk"}) == ("cpu", {"": "disk"})
    assert read_device_map({"": "cuda:1"}) == ("cuda:1", {})
    assert read_device_map({"": 0}) == ("cuda:0", {})
    found = read_device_map({"model.layers.0": 0, "model.layers.1": "cpu", "lm_head": "disk"})
    wishes = {"model.layers.0": "vram", "model.layers.1": "resident", "lm_head": "disk"}
    assert found == ("cuda:0", wishes)


def test_what_packed_weights_do_not_run_on():
    with pytest.raises(BackendError, match="on one CUDA device, got cuda:0, cuda:1"):
        read_device_map({"a": 0, "b": "cuda:1"})
    with pytest.raises(BackendError, match=r"device_map: model: .* one CUDA device, got 'mps'"):
        read_device_map({"": "mps"})


def test_readers_of_device_memory_need_a_device():
    with pytest.raises(BackendError, match="'cufile' reads into device memory"):
        open_reader_for("cufile", "cpu", [])
    with pytest.raises(ConfigError, match="reader must be one of"):
        open_reader_for("magic", "cpu", [])
    open_reader_for("buffered", "cpu", []).close()
