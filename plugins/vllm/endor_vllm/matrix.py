"""A layer's matrix: expanded from the packed bytes for each use, or multiplied where they lie."""

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F

from endor import kernels
from endor.codecs import Encoded
from endor.dtypes import torch_dtype
from endor.kernels.native import WEIGHT_KINDS
from endor.packed import bits_of
from endor.planning.products import PRODUCT_ROWS
from endor_vllm.placement import Placement

_scratch: dict[torch.device, torch.Tensor] = {}


def reserve(device: torch.device, nbytes: int) -> None:
    """Make room on `device` for a dense matrix of `nbytes`: one for all layers, used in turn.

    It is made once, before the first use, for a captured CUDA graph remembers its address.
    """
    held = _scratch.get(device)
    if held is None or held.numel() < nbytes:
        _scratch[device] = torch.empty(nbytes, dtype=torch.uint8, device=device)


_Views = tuple[list[tuple[int, Encoded]], list[kernels.Prepared]]


class Matrix:
    """One layer's packed matrix.

    Args:
        name: The layer, for messages.
        shape: `(rows, cols)` on this rank.
        dtype: Element type that the layer computes in; a stored one that differs is converted.
        placement: Where what is packed lies in the layer's bytes.
        threads: Of the kernels on the CPU; None leaves it to Endor.
        exact: Expand for every product. Without, up to eight rows are multiplied by the packed
            form on the CPU, with sums of another order.

    Attributes:
        expansions: How often it was expanded.
        products: How often it was multiplied as it lies.
    """

    def __init__(
        self,
        name: str,
        shape: tuple[int, int],
        dtype: torch.dtype,
        placement: Placement,
        *,
        exact: bool,
        threads: int | None = None,
    ) -> None:
        self.name, self.shape, self.dtype, self.placement = name, shape, dtype, placement
        self.exact = exact
        self._threads = threads
        self.expansions = 0
        self.products = 0
        parts = placement.parts
        self._lies_dense = (
            len(parts) == 1
            and parts[0].spec.codec == "dense"
            and torch_dtype(parts[0].spec.dtype) == dtype
        )
        self._multiplies = all(
            part.spec.dtype.name in WEIGHT_KINDS and torch_dtype(part.spec.dtype) == dtype
            for part in parts
        )
        self._bound: dict[int, _Views] = {}
        self._launches: dict[tuple[int, int], Callable[[], None]] = {}

    @property
    def dense_nbytes(self) -> int:
        """Bytes of the expanded matrix; 0 where there is nothing to expand."""
        return 0 if self._lies_dense else self.shape[0] * self.shape[1] * self.dtype.itemsize

    def linear(
        self, x: torch.Tensor, data: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """Return `x @ matrix.T + bias`.

        Args:
            x: `(..., cols)`.
            data: u8, the layer's bytes.
            bias: `(rows,)` or None.
        """
        rows = x.numel() // self.shape[1]
        if (
            not self.exact
            and self._multiplies
            and not self._lies_dense
            and 0 < rows <= PRODUCT_ROWS
            and x.device.type == "cpu"
            and x.dtype == self.dtype
        ):
            return self._product(x.reshape(rows, -1), data, bias).view(*x.shape[:-1], -1)
        return F.linear(x, self.dense(data), bias)

    def dense(self, data: torch.Tensor) -> torch.Tensor:
        """Return the matrix, valid until the next one on its device is expanded."""
        rows, cols = self.shape
        if self._lies_dense:
            at = self.placement.parts[0].offsets[""]
            span = data[at : at + rows * cols * self.dtype.itemsize]
            return span.view(self.dtype).view(rows, cols)
        self.expansions += 1
        reserve(data.device, self.dense_nbytes)
        span = _scratch[data.device][: self.dense_nbytes]
        matrix = span.view(self.dtype).view(rows, cols)
        if data.device.type == "cpu":
            self._expand(data, matrix)
        else:
            self._expand_on_device(data, matrix)
        return matrix

    def _product(
        self, x: torch.Tensor, data: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        x = x.contiguous()
        self.products += 1
        bound, calls = self._views(data)
        pieces = []
        for (_, encoded), call in zip(bound, calls, strict=True):
            piece = torch.empty((len(x), encoded.spec.shape[0]), dtype=torch.float32)
            if call.multiplies:
                call.matvec(encoded, x.data_ptr(), len(x), piece.data_ptr())
            else:
                kernels.matvec(encoded, bits_of(x), piece.numpy(), threads=self._threads)
            pieces.append(piece)
        out = pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1)
        if bias is not None:
            out += bias
        return out.to(x.dtype)

    def _expand(self, data: torch.Tensor, matrix: torch.Tensor) -> None:
        for row, encoded in self._views(data)[0]:
            target = matrix[row : row + encoded.spec.shape[0]]
            stored = torch_dtype(encoded.spec.dtype)
            own = target if stored == self.dtype else torch.empty(target.shape, dtype=stored)
            flat = bits_of(own).reshape(-1)
            kernels.decode(encoded, flat, streaming=False, threads=self._threads)
            if own is not target:
                target.copy_(own)

    def _views(self, data: torch.Tensor) -> _Views:
        """Return the parts over the memory of `data`, which an offloader may exchange."""
        key = data.data_ptr()
        found = self._bound.get(key)
        if found is None:
            bytes_: np.ndarray = data.detach().numpy()
            parts = self.placement.bind(bytes_)
            calls = [kernels.Prepared(each.spec, threads=self._threads) for _, each in parts]
            found = self._bound[key] = (parts, calls)
        return found

    def _expand_on_device(self, data: torch.Tensor, matrix: torch.Tensor) -> None:
        """Enqueue the expansion on the current stream; launches are prepared once per memory."""
        key = (data.data_ptr(), matrix.data_ptr())
        run = self._launches.get(key)
        if run is None:
            run = self._launches[key] = self._prepared(data, matrix)
        run()

    def _prepared(self, data: torch.Tensor, matrix: torch.Tensor) -> Callable[[], None]:
        from endor.kernels import gpu

        items, converted = [], []
        for part in self.placement.parts:
            target = matrix[part.row : part.row + part.spec.shape[0]]
            stored = torch_dtype(part.spec.dtype)
            own = target
            if stored != self.dtype:
                own = torch.empty(target.shape, dtype=stored, device=data.device)
                converted.append((target, own))
            items.append((gpu.DeviceEncoded(part.spec, data.detach(), part.offsets), own))
        expansion = gpu.prepare(items)

        def run() -> None:
            expansion.run()
            for target, own in converted:
                target.copy_(own)

        return run
