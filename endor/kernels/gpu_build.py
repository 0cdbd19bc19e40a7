"""Sources and compiler options of the CUDA kernels, and a compiler that needs no device.

The running library compiles through CuPy (`endor.kernels.gpu`) with the same text and options;
`compile_cubin` proves on any machine that they compile, for any architecture.
"""

import ctypes
import functools
import importlib.util
import re
from pathlib import Path

from endor.codecs import DTYPES
from endor.errors import BackendError
from endor.kernels import gpu_int
from endor.kernels.gpu_launch import Kernel
from endor.kernels.gpu_plan import constants, exp_kernel, raw_kernel
from endor.kernels.gpu_product import MAX_COLUMNS, product_kernel, warp_rows

ARCHITECTURES = ("sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")
"""What the kernels are compiled for in the tests; the oldest is the oldest that runs them."""

OLDEST_CAPABILITY = (7, 5)

SOURCES = Path(__file__).resolve().parent.parent / "cuda"


@functools.cache
def source(name: str) -> str:
    """Return the text of `cuda/<name>.cu` with its own headers in place.

    One text, so that a compile cache keyed by it can never miss a changed header.
    """
    text = (SOURCES / f"{name}.cu").read_text()

    def header(match: re.Match[str]) -> str:
        return (SOURCES / match[1]).read_text().replace("#pragma once\n", "")

    return re.sub(r'^#include "([\w.]+)"$', header, text, flags=re.MULTILINE)


def options(kernel: Kernel) -> tuple[str, ...]:
    """Return the NVRTC options of `kernel`, without the architecture."""
    defines = (*constants(), *kernel.defines)
    return ("-std=c++17", *(f"-D{name}={value}" for name, value in defines))


def all_kernels() -> list[Kernel]:
    """Return kernels that between them compile every line of `cuda/`."""
    kernels = [raw_kernel(itemsize) for itemsize in (1, 2, 4)]
    for dtype in DTYPES.values():
        if dtype.packable:
            rest = dtype.rest_bits % 8
            planes = sum(1 << (rest + k) for k in range(1, dtype.exponent_bits + 1))
            kernels += [exp_kernel(dtype, bitmap=flag, planes=planes) for flag in (True, False)]
    for value in ("BF16", "F16", "F32"):
        for step in ("F16", "BF16", "F32"):
            for by_column in (True, False):
                far = step == "F16" and not by_column
                kernels.append(
                    gpu_int.kernel(
                        value, step, column_steps=by_column, far_steps=far, low_bits=not far
                    )
                )
    columns = [1 << i for i in range(MAX_COLUMNS.bit_length())]
    for name in ("BF16", "F16"):
        for count in columns:
            for planes in (0, 3, 4, 6):
                for bitmap in (True, False) if planes == 3 else (True,):
                    kernels.append(
                        product_kernel(
                            DTYPES[name],
                            columns=count,
                            rows=warp_rows(count, "exp" if planes else "raw"),
                            float_out=name == "F16",
                            bit_planes=planes,
                            bitmap=bitmap,
                        )
                    )
    return kernels


def compile_cubin(kernel: Kernel, architecture: str) -> bytes:
    """Return the machine code of `kernel` for `architecture`, such as `"sm_90"`.

    Raises:
        BackendError: No NVRTC is installed, or it refuses the source.
    """
    nvrtc = _nvrtc()
    if nvrtc is None:
        raise BackendError(
            "compiling needs NVRTC, which was not found: pip install nvidia-cuda-nvrtc"
        )
    program = ctypes.c_void_p()
    text = source(kernel.name).encode()
    status = nvrtc.nvrtcCreateProgram(
        ctypes.byref(program), text, f"{kernel.name}.cu".encode(), 0, None, None
    )
    if status:
        raise BackendError(f"{kernel.name}.cu: nvrtcCreateProgram returned {status}")
    try:
        flags = [f"--gpu-architecture={architecture}", *options(kernel)]
        argv = (ctypes.c_char_p * len(flags))(*(flag.encode() for flag in flags))
        status = nvrtc.nvrtcCompileProgram(program, len(flags), argv)
        if status:
            log = _output(nvrtc, program, "ProgramLog").decode(errors="replace")
            raise BackendError(f"{kernel.name}.cu for {architecture} does not compile:\n{log}")
        return _output(nvrtc, program, "CUBIN")
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


def nvrtc_version() -> tuple[int, int] | None:
    """Return the version of the NVRTC that `compile_cubin` uses; None when there is none."""
    nvrtc = _nvrtc()
    if nvrtc is None:
        return None
    major, minor = ctypes.c_int(), ctypes.c_int()
    nvrtc.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
    return major.value, minor.value


def _output(nvrtc: ctypes.CDLL, program: ctypes.c_void_p, what: str) -> bytes:
    size = ctypes.c_size_t()
    getattr(nvrtc, f"nvrtcGet{what}Size")(program, ctypes.byref(size))
    buffer = ctypes.create_string_buffer(size.value)
    getattr(nvrtc, f"nvrtcGet{what}")(program, buffer)
    return buffer.raw


@functools.cache
def _nvrtc() -> ctypes.CDLL | None:
    """The NVRTC of the `nvidia-cuda-nvrtc` wheel (CUDA 12 or 13 layout), else the system's."""
    spec = importlib.util.find_spec("nvidia")
    for root in (spec.submodule_search_locations or []) if spec else []:
        for folder in ("cu13/lib", "cuda_nvrtc/lib"):
            found = sorted(Path(root, folder).glob("libnvrtc.so.*"))
            found = [path for path in found if "alt" not in path.name]
            if not found:
                continue
            for builtins in sorted(found[0].parent.glob("libnvrtc-builtins.so.*")):
                if "alt" not in builtins.name:
                    ctypes.CDLL(str(builtins), mode=ctypes.RTLD_GLOBAL)
            return ctypes.CDLL(str(found[0]))
    for name in ("libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so"):
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    return None
