"""Launches through CuPy: kernels compiled at first use, on torch's current stream."""

import functools
from typing import Any

import torch

from endor.errors import BackendError
from endor.kernels import gpu_build, gpu_device
from endor.kernels.gpu_launch import Kernel, Launch


@functools.cache
def _function(kernel: Kernel) -> Any:
    """The compiled kernel. CuPy loads it once per device, at its first launch there."""
    module = gpu_device.cupy_module().RawModule(
        code=gpu_build.source(kernel.name), options=gpu_build.options(kernel), backend="nvrtc"
    )
    return module.get_function(kernel.name)


@functools.cache
def _stream(pointer: int) -> Any:
    """CuPy's view of a torch stream. It owns nothing, so caching it is safe."""
    return gpu_device.cupy_module().cuda.ExternalStream(pointer)


@functools.cache
def shared_limit(index: int) -> int:
    """Return the shared memory that a product's block may take: two fit a multiprocessor."""
    attributes = gpu_device.cupy_module().cuda.Device(index).attributes
    return int(attributes["MaxSharedMemoryPerBlockOptin"]) // 2 - 1024


_enlarged: dict[tuple[Kernel, int], int] = {}


def enqueue(launch: Launch, index: int) -> None:
    """Enqueue on the current stream of device `index`, whichever device the thread is on."""
    cupy = gpu_device.cupy_module()
    stream = torch.cuda.current_stream(index)
    with cupy.cuda.Device(index), _stream(stream.cuda_stream):
        try:
            function = _function(launch.kernel)
            needed = launch.shared_bytes
            if needed > 48 << 10 and _enlarged.get((launch.kernel, index), 0) < needed:
                function.max_dynamic_shared_size_bytes = needed
                _enlarged[launch.kernel, index] = needed
            function(
                (launch.grid,), (launch.block,), (launch.args,), shared_mem=launch.shared_bytes
            )
        except (
            # The driver's and the runtime's errors are RuntimeErrors, as are CuPy's own, such as
            # of headers that it cannot find; a missing NVRTC is an ImportError or an OSError.
            cupy.cuda.compiler.CompileException,
            RuntimeError,
            ImportError,
            OSError,
        ) as error:
            raise BackendError(
                f"cuda/{launch.kernel.name}.cu does not run on "
                f"{torch.cuda.get_device_name(index)}: {error}"
            ) from error
