"""The codecs on a CUDA device: expansion and products from packed weights in device memory.

NVRTC compiles `cuda/*.cu` through CuPy at first use, and CuPy keeps the result on disk.
Every launch goes to torch's current stream (CuPy does not follow it), allocates nothing and never
waits, so it can be captured into a CUDA graph once the kernel has run a first time.
"""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from endor.codecs import Encoded, TensorSpec
from endor.dtypes import torch_dtype
from endor.errors import BackendError, DTypeError, ShapeError
from endor.kernels import gpu_build, gpu_device, gpu_plan, gpu_product
from endor.kernels.gpu_device import require
from endor.kernels.gpu_launch import Kernel, Launch, Part

ALIGN = 256
"""Where `upload` places arrays, as records do."""


@dataclass(frozen=True, slots=True)
class DeviceEncoded:
    """A stored tensor in device memory.

    Attributes:
        spec: Shape, codec and sizes.
        storage: `uint8`, holds the arrays and 128 readable bytes after the last one.
        offsets: Byte offset in `storage` of each array, by suffix.
        segment_nnz: Most stored elements in `gpu_product.SEGMENT` columns of a row, or more.
    """

    spec: TensorSpec
    storage: torch.Tensor
    offsets: Mapping[str, int]
    segment_nnz: int = gpu_product.SEGMENT

    @property
    def device(self) -> torch.device:
        return self.storage.device

    @property
    def nbytes(self) -> int:
        return self.spec.nbytes

    @property
    def addresses(self) -> dict[str, int]:
        """Device address of each array."""
        begin = self.storage.data_ptr()
        return {suffix: begin + offset for suffix, offset in self.offsets.items()}


class Expansion:
    """Prepared launches that write fixed packed tensors into fixed destinations.

    The memory of both must outlive the object's last `run` on the device, number `index`.
    """

    def __init__(
        self,
        launches: Sequence[Launch],
        copies: Sequence[tuple[torch.Tensor, torch.Tensor]],
        index: int = 0,
    ) -> None:
        self._copies = copies
        self._launches = launches
        self._index = index

    def run(self) -> None:
        """Enqueue on the current stream of the tensors' device; ordered there, not finished."""
        for out, stored in self._copies:
            out.copy_(stored)
        for launch in self._launches:
            _launch(launch, self._index)


def upload(encoded: Encoded, device: torch.device | str) -> DeviceEncoded:
    """Return `encoded` in device memory: one allocation, one copy."""
    target = gpu_device.checked_device(device)
    offsets, end = {}, 0
    for suffix, array in encoded.arrays.items():
        offsets[suffix] = end
        end += -(-array.nbytes // ALIGN) * ALIGN
    host = np.zeros(end + gpu_plan.READ_AHEAD, dtype=np.uint8)
    for suffix, array in encoded.arrays.items():
        flat = array.reshape(-1).view(np.uint8)
        host[offsets[suffix] : offsets[suffix] + flat.size] = flat
    fullest = gpu_product.SEGMENT
    if gpu_product.product_refusal(encoded.spec) is None:
        fullest = gpu_product.segment_nnz(encoded.spec, encoded.arrays.get("bitmap"))
    return DeviceEncoded(encoded.spec, torch.from_numpy(host).to(target), offsets, fullest)


def download(packed: DeviceEncoded) -> Encoded:
    """Return a copy of `packed` in host memory."""
    host = packed.storage.cpu().numpy()
    arrays = {}
    for item in packed.spec.arrays:
        begin = packed.offsets[item.suffix]
        flat = host[begin : begin + item.nbytes].copy()
        arrays[item.suffix] = flat.view(item.dtype.uint).reshape(item.shape)
    return Encoded(packed.spec, arrays)


def decode(packed: DeviceEncoded, out: torch.Tensor | None = None) -> torch.Tensor:
    """Write the dense form of `packed` and return it, bit-exact.

    Args:
        packed: Weight in device memory.
        out: Destination of its shape and element type, contiguous, on its device, starting at a
            multiple of 16 bytes. Allocated when omitted.

    Returns:
        `out`: ordered on torch's current stream, not finished.

    Raises:
        BackendError: The kernels cannot run here.
        DTypeError, ShapeError: `out` does not fit.
    """
    if out is None:
        out = torch.empty(
            packed.spec.shape, dtype=torch_dtype(packed.spec.dtype), device=packed.device
        )
    if packed.spec.transposed:
        _check_out(packed, out)
        out.copy_(decode(as_stored(packed)).T)
    else:
        prepare([(packed, out)]).run()
    return out


def as_stored(packed: DeviceEncoded) -> DeviceEncoded:
    """Return the matrix whose elements the arrays hold in order, maybe the transposed one."""
    return replace(packed, spec=packed.spec.stored)


def prepare(items: Sequence[tuple[DeviceEncoded, torch.Tensor]]) -> Expansion:
    """Return the launches that expand each tensor of `items` into its destination.

    Tensors of one codec, element type and bitmap kind share a launch: a record takes one.

    Raises:
        BackendError: The kernels cannot run here.
        DTypeError, ShapeError: A destination does not fit, or a matrix is stored transposed.
    """
    parts, copies = [], []
    devices = {packed.device for packed, _ in items}
    if len(devices) > 1:
        raise ShapeError(f"the tensors must be on one device, got {sorted(map(str, devices))}")
    for packed, out in items:
        require(packed.device)
        _check_out(packed, out)
        if packed.spec.transposed:
            raise ShapeError("expand a matrix that is stored transposed by itself: gpu.decode")
        if packed.spec.codec == "dense":
            begin = packed.offsets[""]
            stored = packed.storage[begin : begin + packed.spec.nbytes]
            copies.append((out.view(-1).view(torch.uint8), stored))
        else:
            parts.append(Part(packed.spec, packed.addresses, out.data_ptr()))
    index = gpu_device.index_of(items[0][0].device) if items else 0
    return Expansion(gpu_plan.plan_expansion(parts), copies, index)


def product(
    packed: DeviceEncoded, x: torch.Tensor, out: torch.Tensor | None = None
) -> torch.Tensor:
    """Return `x @ W.T` straight from the packed W, with fp32 sums.

    Deterministic, but not bit-equal to a dense product, which adds in another order.

    Args:
        packed: W, codec `raw` or `exp`, BF16 or F16, `(rows, cols)` with cols a multiple of 32.
        x: `(batch, cols)`, batch 1 to 8, W's element type, contiguous, on W's device.
        out: `(batch, rows)`, W's element type or fp32, contiguous. Allocated when omitted.

    Returns:
        `out`: ordered on torch's current stream, not finished.

    Raises:
        BackendError: The kernels cannot run here.
        DTypeError: The kernel does not take such a weight, x or `out`; expand the weight instead.
        ShapeError: x or `out` has another shape, layout, alignment or device.
    """
    require(packed.device)
    why = gpu_product.product_refusal(packed.spec)
    if why:
        raise DTypeError(f"the product kernel cannot run: {why}; expand the weight instead")
    rows, cols = packed.spec.shape
    dtype = torch_dtype(packed.spec.dtype)
    if x.dtype != dtype:
        raise DTypeError(f"x must be {dtype} like the weight, got {x.dtype}")
    if x.ndim != 2 or x.shape[1] != cols or not x.is_contiguous() or x.device != packed.device:
        raise ShapeError(
            f"x must be contiguous (batch, {cols}) on {packed.device}, got {tuple(x.shape)} with "
            f"strides {x.stride()} on {x.device}"
        )
    if out is None:
        out = torch.empty((len(x), rows), dtype=dtype, device=packed.device)
    if out.dtype not in (dtype, torch.float32):
        raise DTypeError(f"out must be {dtype} or torch.float32, got {out.dtype}")
    if out.shape != (len(x), rows) or not out.is_contiguous() or out.device != packed.device:
        raise ShapeError(
            f"out must be contiguous ({len(x)}, {rows}) on {packed.device}, got "
            f"{tuple(out.shape)} with strides {out.stride()} on {out.device}"
        )
    index = gpu_device.index_of(packed.device)
    launch = gpu_product.plan_product(
        packed.spec,
        packed.addresses,
        x=x.data_ptr(),
        y=out.data_ptr(),
        batch=len(x),
        float_out=out.dtype == torch.float32,
        segment_nnz=packed.segment_nnz,
        shared_limit=shared_limit(index),
    )
    _launch(launch, index)
    return out


def _check_out(packed: DeviceEncoded, out: torch.Tensor) -> None:
    dtype = torch_dtype(packed.spec.dtype)
    if out.dtype != dtype:
        raise DTypeError(f"out must be {dtype}, got {out.dtype}")
    if out.shape != packed.spec.shape or not out.is_contiguous():
        raise ShapeError(
            f"out must be contiguous of shape {packed.spec.shape}, got {tuple(out.shape)} with "
            f"strides {out.stride()}"
        )
    if out.device != packed.device:
        raise ShapeError(f"out must be on {packed.device} like the weight, got {out.device}")


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


def _launch(launch: Launch, index: int) -> None:
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
