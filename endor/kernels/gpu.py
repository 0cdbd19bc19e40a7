"""The codecs on a CUDA device: expansion of packed weights in device memory.

NVRTC compiles `cuda/*.cu` through CuPy at first use, and CuPy keeps the result on disk.
Every launch goes to torch's current stream (CuPy does not follow it), allocates nothing and never
waits, so it can be captured into a CUDA graph once the kernel has run a first time.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from endor.codecs import Encoded, TensorSpec
from endor.dtypes import torch_dtype
from endor.errors import BackendError, DTypeError, ShapeError
from endor.kernels import gpu_device, gpu_plan, gpu_product
from endor.kernels.gpu_device import require
from endor.kernels.gpu_launch import Launch, Part
from endor.kernels.gpu_run import enqueue

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
            enqueue(launch, self._index)


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
    """Return the matrix whose elements the arrays hold in order, maybe the transposed one.

    Raises:
        BackendError: It is in bundles, which no device expands.
    """
    if packed.spec.bundles is not None:
        raise BackendError(
            "no device expands a matrix in bundles: decompress it on the processor, or pack with "
            "--neurons instead of --bundle-neurons"
        )
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
