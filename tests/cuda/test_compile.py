"""Every kernel compiles for every architecture, on a machine without a device."""

import os

import pytest

from endor.codecs import DTYPES
from endor.errors import BackendError
from endor.kernels import gpu_build
from endor.kernels.gpu_build import ARCHITECTURES, SOURCES, all_kernels, compile_cubin
from endor.kernels.gpu_plan import exp_kernel, raw_kernel
from endor.kernels.gpu_product import product_kernel

BF16, F16, F32, I8 = (DTYPES[name] for name in ("BF16", "F16", "F32", "I8"))
TYPICAL = [
    *(raw_kernel(itemsize) for itemsize in (1, 2, 4)),
    exp_kernel(BF16, bitmap=True, planes=1 << 2 | 1 << 3),
    exp_kernel(BF16, bitmap=False, planes=1 << 3),
    exp_kernel(F16, bitmap=True, planes=1 << 6),
    exp_kernel(F32, bitmap=True, planes=1 << 3),
    exp_kernel(I8, bitmap=True, planes=1 << 4),
    product_kernel(BF16, columns=1, rows=4, float_out=False),
    product_kernel(F16, columns=8, rows=16, float_out=True),
    product_kernel(BF16, columns=1, rows=4, float_out=False, bit_planes=3),
    product_kernel(F16, columns=8, rows=16, float_out=True, bit_planes=6),
    product_kernel(BF16, columns=2, rows=8, float_out=True, bit_planes=3, bitmap=False),
]
REQUIRED = os.environ.get("ENDOR_REQUIRE_NVRTC") == "1"


@pytest.fixture(autouse=True)
def _nvrtc() -> None:
    if gpu_build.nvrtc_version() is None:
        reason = "no NVRTC: pip install nvidia-cuda-nvrtc"
        if REQUIRED:
            pytest.fail(f"ENDOR_REQUIRE_NVRTC=1, but {reason}")
        pytest.skip(reason)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_compiles(architecture):
    for kernel in TYPICAL:
        assert kernel.name.encode() in compile_cubin(kernel, architecture)


@pytest.mark.slow
def test_every_variant_compiles():
    for kernel in all_kernels():
        assert kernel.name.encode() in compile_cubin(kernel, "sm_90")


def test_a_kernel_that_does_not_compile_says_why():
    with pytest.raises(BackendError, match=r"(?s)expand_raw.cu for sm_90.*must be 1, 2 or 4"):
        compile_cubin(raw_kernel(3), "sm_90")


def test_the_sources_refuse_other_compilers(monkeypatch):
    monkeypatch.setattr(gpu_build, "constants", lambda: ())
    with pytest.raises(BackendError, match=r"through endor\.kernels\.gpu_build"):
        compile_cubin(raw_kernel(2), "sm_90")


def test_without_a_compiler_the_error_names_the_wheel(monkeypatch):
    monkeypatch.setattr(gpu_build, "_nvrtc", lambda: None)
    with pytest.raises(BackendError, match="pip install nvidia-cuda-nvrtc"):
        compile_cubin(raw_kernel(2), "sm_90")


def test_sources_are_whole():
    """One text per kernel: nothing left to look up when it is compiled elsewhere."""
    for path in SOURCES.glob("*.cu"):
        assert '#include "' not in gpu_build.source(path.stem)
