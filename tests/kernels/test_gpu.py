"""What the GPU kernels check before a launch, as far as it needs no device."""

import subprocess
import sys

import pytest
import torch

from endor import codecs
from endor.codecs import DTYPES
from endor.errors import BackendError, ShapeError
from endor.kernels import gpu, gpu_device, gpu_run
from endor.kernels.gpu_launch import Part
from endor.kernels.gpu_plan import plan_expansion


def test_another_device_is_refused():
    with pytest.raises(BackendError, match="run on CUDA devices, not on cpu"):
        gpu_device.require("cpu")


def test_without_a_device_the_reason_is_given(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(BackendError, match="sees no CUDA device"):
        gpu_device.require("cuda")
    assert gpu_device.describe() == {"available": False, "reason": gpu_device.refusal()}


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
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Old Card")
    monkeypatch.setattr(gpu_device, "cupy_module", lambda: Cupy)
    gpu_device._refusal.cache_clear()


def test_too_old_a_driver_is_named(monkeypatch):
    fake_cupy(monkeypatch, 12040, (9, 0))
    with pytest.raises(BackendError, match=r"speaks CUDA 12\.4, too old for .* 13.*cuda12"):
        gpu_device.require("cuda:0")
    gpu_device._refusal.cache_clear()


def test_too_old_a_card_is_named(monkeypatch):
    fake_cupy(monkeypatch, 13000, (7, 0))
    with pytest.raises(BackendError, match=r"Old Card has compute capability 7\.0; .* need 7\.5"):
        gpu_device.require("cuda:0")
    gpu_device._refusal.cache_clear()
    fake_cupy(monkeypatch, 13000, (7, 5))
    gpu_device.require("cuda:0")
    gpu_device._refusal.cache_clear()


def test_a_device_that_is_not_there_is_named(monkeypatch):
    fake_cupy(monkeypatch, 13000, (9, 0))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-12")
    with pytest.raises(BackendError, match=r"no cuda:3: torch sees 1 .*cuda:0.* is MIG-12"):
        gpu_device.require("cuda:3")


def test_after_a_fork_the_way_out_is_named(monkeypatch):
    fake_cupy(monkeypatch, 13000, (9, 0))
    monkeypatch.setattr(gpu_device, "_forked_after_start", False)
    gpu_device._note_fork()
    gpu_device.require("cuda:0")
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    gpu_device._note_fork()
    with pytest.raises(BackendError, match=r"forked after CUDA had started.*'spawn'"):
        gpu_device.require("cuda:0")
    gpu_device._refusal.cache_clear()


class StubCupy:
    """Records which device and stream a launch goes to; a kernel may fail as CuPy's do."""

    def __init__(self, error: Exception | None = None) -> None:
        outer, self.calls, self.at = self, [], []

        class Context:
            def __init__(self, value: int) -> None:
                self.value = value

            def __enter__(self) -> None:
                outer.at.append(self.value)

            def __exit__(self, *_: object) -> None:
                outer.at.pop()

        class RawModule:
            def __init__(self, **_: object) -> None: ...

            def get_function(self, name: str):
                def run(*_: object, **__: object) -> None:
                    if error is not None:
                        raise error
                    outer.calls.append((name, tuple(outer.at)))

                return run

        class CompileException(Exception):
            pass

        self.RawModule = RawModule
        self.cuda = type("cuda", (), {"Device": Context, "ExternalStream": Context})
        self.cuda.compiler = type("compiler", (), {"CompileException": CompileException})


@pytest.fixture
def launch(rng):
    dtype = DTYPES["BF16"]
    spec = codecs.encode(rng.integers(1, 99, 2000).astype("u2"), dtype, codec="raw").spec
    at = {"tile_offsets": 256, "bitmap": 512, "values": 1024}
    (made,) = plan_expansion([Part(spec, at, 4096)])
    gpu_run._function.cache_clear()
    gpu_run._stream.cache_clear()
    yield made
    gpu_run._function.cache_clear()
    gpu_run._stream.cache_clear()


def test_a_launch_goes_to_the_tensors_device(monkeypatch, launch):
    cupy = StubCupy()
    monkeypatch.setattr(gpu_device, "cupy_module", lambda: cupy)
    stream = type("Stream", (), {})
    monkeypatch.setattr(
        torch.cuda,
        "current_stream",
        lambda index=None: type("S", (stream,), {"cuda_stream": 100 + index}),
    )
    gpu.Expansion([launch], [], 1).run()
    gpu.Expansion([launch], []).run()
    assert cupy.calls == [("expand_raw", (1, 101)), ("expand_raw", (0, 100))]


@pytest.mark.parametrize("error", [RuntimeError, OSError, ImportError, "CompileException"])
def test_every_failure_of_a_launch_is_ours(monkeypatch, launch, error):
    cupy = StubCupy()
    if isinstance(error, str):
        error = cupy.cuda.compiler.CompileException
    failing = StubCupy(error("cannot find CUDA headers"))
    failing.cuda.compiler = cupy.cuda.compiler
    monkeypatch.setattr(gpu_device, "cupy_module", lambda: failing)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"card {index}")
    monkeypatch.setattr(
        torch.cuda, "current_stream", lambda index=None: type("S", (), {"cuda_stream": 0})
    )
    with pytest.raises(BackendError, match=r"expand_raw\.cu does not run on card 1: cannot find"):
        gpu.Expansion([launch], [], 1).run()


def test_without_cupy_the_extra_is_named(monkeypatch):
    def missing() -> None:
        raise ImportError("No module named 'cupy'")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(gpu_device, "cupy_module", missing)
    for version, extra in (("12.8", "cuda12"), ("13.0", "cuda13")):
        monkeypatch.setattr(torch.version, "cuda", version)
        gpu_device._refusal.cache_clear()
        with pytest.raises(
            BackendError, match=rf"need CuPy .*pip install 'endor-sparse\[{extra}\]'"
        ):
            gpu_device.require("cuda:0")
    gpu_device._refusal.cache_clear()


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
