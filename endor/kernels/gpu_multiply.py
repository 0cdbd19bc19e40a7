"""Products from packed weights on a CUDA device: planned once, launched at every token."""

import torch

from endor.dtypes import torch_dtype
from endor.errors import DTypeError, ShapeError
from endor.kernels import gpu_device, gpu_product
from endor.kernels.gpu import DeviceEncoded
from endor.kernels.gpu_launch import Launch
from endor.kernels.gpu_run import enqueue, shared_limit


class Multiplication:
    """Products with one packed weight that stays where it is in device memory.

    The launch for each number of rows of x is planned at its first use and kept; a run writes the
    addresses of x and y into a copy of its argument, so that any thread may run it.

    Args:
        packed: W, codec `raw` or `exp`, BF16 or F16, `(rows, cols)` with cols a multiple of 32.

    Raises:
        BackendError: The kernels cannot run here.
        DTypeError: No kernel takes such a weight; expand it instead.
    """

    def __init__(self, packed: DeviceEncoded) -> None:
        gpu_device.require(packed.device)
        why = gpu_product.product_refusal(packed.spec)
        if why:
            raise DTypeError(f"the product kernel cannot run: {why}; expand the weight instead")
        self._packed = packed
        self._device = packed.device
        self._dtype = torch_dtype(packed.spec.dtype)
        self._rows, self._cols = packed.spec.shape
        self._index = gpu_device.index_of(packed.device)
        self._launches: dict[tuple[int, bool], Launch] = {}

    def run(self, x: torch.Tensor, out: torch.Tensor) -> None:
        """Enqueue `out = x @ W.T` on the current stream of W's device; not finished on return.

        Args:
            x: `(batch, cols)`, batch 1 to 8, W's element type, contiguous, on W's device.
            out: `(batch, rows)`, W's element type or fp32, contiguous, on W's device.

        Raises:
            BackendError: The kernel does not run.
            DTypeError, ShapeError: x or `out` does not fit.
        """
        self._check(x, out)
        key = len(x), out.dtype == torch.float32
        launch = self._launches.get(key)
        if launch is None:
            launch = self._launches[key] = self._plan(*key)
        enqueue(gpu_product.with_operands(launch, x.data_ptr(), out.data_ptr()), self._index)

    def _plan(self, batch: int, float_out: bool) -> Launch:
        packed = self._packed
        return gpu_product.plan_product(
            packed.spec,
            packed.addresses,
            x=0,
            y=0,
            batch=batch,
            float_out=float_out,
            segment_nnz=packed.segment_nnz,
            shared_limit=shared_limit(self._index),
        )

    def _check(self, x: torch.Tensor, out: torch.Tensor) -> None:
        dtype, device = self._dtype, self._device
        if x.dtype != dtype:
            raise DTypeError(f"x must be {dtype} like the weight, got {x.dtype}")
        if x.ndim != 2 or x.shape[1] != self._cols or not x.is_contiguous() or x.device != device:
            raise ShapeError(
                f"x must be contiguous (batch, {self._cols}) on {device}, got {tuple(x.shape)} "
                f"with strides {x.stride()} on {x.device}"
            )
        if out.dtype not in (dtype, torch.float32):
            raise DTypeError(f"out must be {dtype} or torch.float32, got {out.dtype}")
        if out.shape != (len(x), self._rows) or not out.is_contiguous() or out.device != device:
            raise ShapeError(
                f"out must be contiguous ({len(x)}, {self._rows}) on {device}, got "
                f"{tuple(out.shape)} with strides {out.stride()} on {out.device}"
            )


def product(
    packed: DeviceEncoded, x: torch.Tensor, out: torch.Tensor | None = None
) -> torch.Tensor:
    """Return `x @ W.T` straight from the packed W, with fp32 sums.

    Deterministic, but not bit-equal to a dense product, which adds in another order. Whoever
    multiplies by a weight again keeps a `Multiplication`.

    Args:
        packed: W, see `Multiplication`.
        x: `(batch, cols)`, batch 1 to 8, W's element type, contiguous, on W's device.
        out: `(batch, rows)`, W's element type or fp32, contiguous. Allocated when omitted.

    Returns:
        `out`: ordered on torch's current stream, not finished.

    Raises:
        BackendError, DTypeError, ShapeError: See `Multiplication`.
    """
    work = Multiplication(packed)
    if out is None:
        dtype = torch_dtype(packed.spec.dtype)
        out = torch.empty((len(x), packed.spec.shape[0]), dtype=dtype, device=packed.device)
    work.run(x, out)
    return out
