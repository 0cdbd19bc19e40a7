"""What the GPU kernels check before a launch, as far as it needs no device."""

import subprocess
import sys

import pytest
import torch

from endor import codecs
from endor.codecs import DTYPES
from endor.errors import BackendError, ShapeError
from endor.kernels import gpu
from endor.kernels.gpu_plan import Part, plan_expansion


def test_another_device_is_refused():
    with pytest.raises(BackendError, match="run on CUDA devices, not on cpu"):
        gpu.require("cpu")


def test_without_a_device_the_reason_is_given(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(BackendError, match="sees no CUDA device"):
        gpu.require("cuda")
    assert gpu.describe() == {"available": False, "reason": gpu.refusal()}


def fake_cupy(monkeypatch, driver: int, capability: tuple[int, int]) -> None:
    """A CuPy of CUDA 13 on a driver of version `driver`."""

    class Runtime:
        CUDARuntimeError = RuntimeError
        driverGetVersion = staticmethod(lambda: driver)
        runtimeGetVersion = staticmethod(lambda: 13020)

    class Cupy:
        class cuda:
            runtime = Runtime

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Old Card")
    monkeypatch.setattr(gpu, "_cupy", lambda: Cupy)
    gpu._refusal.cache_clear()


def test_too_old_a_driver_is_named(monkeypatch):
    fake_cupy(monkeypatch, 12040, (9, 0))
    with pytest.raises(BackendError, match=r"speaks CUDA 12\.4, too old for .* 13.*cuda12"):
        gpu.require("cuda:0")
    gpu._refusal.cache_clear()


def test_too_old_a_card_is_named(monkeypatch):
    fake_cupy(monkeypatch, 13000, (7, 0))
    with pytest.raises(BackendError, match=r"Old Card has compute capability 7\.0; .* need 7\.5"):
        gpu.require("cuda:0")
    gpu._refusal.cache_clear()
    fake_cupy(monkeypatch, 13000, (7, 5))
    gpu.require("cuda:0")
    gpu._refusal.cache_clear()


def test_without_cupy_the_extra_is_named(monkeypatch):
    def missing() -> None:
        raise ImportError("No module named 'cupy'")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu, "_cupy", missing)
    for version, extra in (("12.8", "cuda12"), ("13.0", "cuda13")):
        monkeypatch.setattr(torch.version, "cuda", version)
        gpu._refusal.cache_clear()
        with pytest.raises(BackendError, match=rf"need CuPy .*pip install 'endor\[{extra}\]'"):
            gpu.require("cuda:0")
    gpu._refusal.cache_clear()


def test_addresses_must_be_aligned(rng):
    dtype = DTYPES["BF16"]
    spec = codecs.encode(rng.integers(1, 99, 2000).astype("u2"), dtype, codec="raw").spec
    at = {"tile_offsets": 256, "bitmap": 512, "values": 1024}
    plan_expansion([Part(spec, at, 4096)])
    with pytest.raises(ShapeError, match="out must start at a multiple of 16, got address 0x1002"):
        plan_expansion([Part(spec, at, 4098)])
    with pytest.raises(ShapeError, match="bitmap must start at a multiple of 4"):
        plan_expansion([Part(spec, at | {"bitmap": 514}, 4096)])


def test_importing_the_kernels_does_not_load_cupy():
    script = "import sys, endor.kernels.gpu; print('cupy' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    assert out.stdout.strip() == "False"
