"""One torch tensor, packed and unpacked."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from endor import codecs, kernels
from endor.codecs import CodecChoice, DType, Encoded, TensorSpec
from endor.dtypes import TORCH_NAMES, endor_dtype, torch_dtype
from endor.errors import ConfigError, DTypeError, ShapeError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True, repr=False)
class PackedTensor:
    """A weight in stored form, on the host or on a CUDA device.

    Attributes:
        spec: Shape, element type, codec and sizes.
        data: `Encoded` numpy arrays on the host; `endor.kernels.gpu.DeviceEncoded` on a device.
    """

    spec: TensorSpec
    data: Any

    def __repr__(self) -> str:
        spec = self.spec
        density = f", density {spec.nnz / spec.numel:.2f}" if spec.numel and spec.bitmap else ""
        return (
            f"PackedTensor({list(spec.shape)} {spec.dtype.name}, {spec.codec}{density}, "
            f"{spec.bits_per_weight:.2f} bits a weight)"
        )

    @property
    def shape(self) -> "torch.Size":
        import torch

        return torch.Size(torch_shape(self.spec.shape, self.spec.dtype))

    @property
    def dtype(self) -> "torch.dtype":
        return torch_dtype(self.spec.dtype)

    @property
    def device(self) -> "torch.device":
        import torch

        return torch.device("cpu") if isinstance(self.data, Encoded) else self.data.device

    @property
    def nnz(self) -> int:
        """Stored elements."""
        return self.spec.nnz

    @property
    def nbytes(self) -> int:
        """Bytes of the stored arrays."""
        return self.spec.nbytes

    @property
    def bits_per_weight(self) -> float:
        return self.spec.bits_per_weight

    def codes(self) -> "torch.Tensor":
        """Return the integer codes of a tensor in codec `int`, int32, on the CPU.

        Raises:
            FormatError: It is stored in another codec, or its arrays contradict each other.
        """
        import torch

        encoded = self.to("cpu").data
        codecs.validate(encoded)
        return torch.from_numpy(kernels.integer.codes_of(encoded))

    def steps(self) -> "torch.Tensor":
        """Return the steps of a tensor in codec `int`, float32 `(R, C)`, on the CPU.

        One for each block of rows and columns. Errors as for `codes`.
        """
        import torch

        return torch.from_numpy(codecs.integer.steps_of(self.to("cpu").data).copy())

    def to(self, device: "str | torch.device") -> "PackedTensor":
        """Return the tensor on `device`, still packed."""
        import torch

        target = torch.device(device)
        if target == self.device or (target.type == "cpu" and self.device.type == "cpu"):
            return self
        from endor.kernels import gpu

        moved = gpu.download(self.data) if target.type == "cpu" else gpu.upload(self.data, target)
        return PackedTensor(self.spec, moved)


def compress(
    tensor: "torch.Tensor | np.ndarray",
    *,
    codec: CodecChoice = "auto",
    bitmap: bool | None = None,
    bits: float | None = None,
) -> PackedTensor:
    """Return `tensor` in stored form; `decompress` gives back its exact bits, but with `bits`.

    Args:
        tensor: Any shape and element type of the safetensors format, on any device, or a numpy
            array (types of `ml_dtypes` included). Packing runs on the CPU.
        codec: `"auto"` takes whatever needs the fewest bytes; `"raw"` is a bitmap and the
            non-zeros, `"exp"` codes their exponents too, `"dense"` stores the tensor as it is.
        bitmap: Force a bitmap on or off; None leaves it to the size.
        bits: Round the values to integers times one step, such that an element takes this many
            bits in all (1.5 to 8.5). Nothing but the tensor is looked at; `endor pack --bits`
            looks at what its inputs are like as well, and loses far less at the same size.

    Returns:
        The packed tensor, on `tensor`'s device. It owns its memory.

    Raises:
        DTypeError: The element type has no safetensors code.
        ConfigError: The forced codec does not apply to the element type, or `bits` is out of range
            or combined with one.
        QuantizationError: `bits` is given and a value is not finite.
    """
    if isinstance(tensor, np.ndarray):
        tensor = _tensor_of_array(tensor)
    if bits is not None:
        return _round(tensor, bits, codec, bitmap)
    elements = bits_of(tensor.detach().cpu())
    dtype = endor_dtype(tensor.dtype)
    if dtype.bits:
        encoded = codecs.dense.encode_as(elements, dtype, endor_shape(tensor, dtype))
    else:
        encoded = kernels.encode(elements, dtype, codec=codec, bitmap=bitmap)
    if encoded.spec.codec == "dense":
        encoded = Encoded(encoded.spec, {"": encoded.arrays[""].copy()})
    packed = PackedTensor(encoded.spec, encoded)
    return packed if tensor.device.type == "cpu" else packed.to(tensor.device)


def _tensor_of_array(array: np.ndarray) -> "torch.Tensor":
    """Return the bits of a numpy array as a torch tensor; a copy only where it must be one."""
    code = TORCH_NAMES.get(array.dtype.name)
    if code is None:
        raise DTypeError(f"numpy's {array.dtype} has no safetensors code and cannot be stored")
    item = codecs.dtype(code)
    if not array.dtype.isnative:
        array = array.astype(array.dtype.newbyteorder("="))
    plain = np.require(array, requirements=("C", "W"))
    return tensor_of(plain.reshape(-1).view(item.uint).reshape(array.shape), item)


def _round(
    tensor: "torch.Tensor", bits: float, codec: CodecChoice, bitmap: bool | None
) -> PackedTensor:
    """Return `tensor` in codes that take `bits` an element."""
    from endor.codecs.rounding import round_to_bits

    if codec != "auto" or bitmap is not None:
        raise ConfigError("bits: goes with no other codec or bitmap; leave them out")
    if not tensor.is_floating_point():
        raise DTypeError(f"bits: needs floating-point values, got {tensor.dtype}")
    codes, step = round_to_bits(tensor.detach().cpu().float().numpy(), bits)
    from endor.kernels import integer

    encoded = integer.encode(codes, step, endor_dtype(tensor.dtype))
    packed = PackedTensor(encoded.spec, encoded)
    return packed if tensor.device.type == "cpu" else packed.to(tensor.device)


def pack_codes(
    codes: "torch.Tensor",
    steps: "torch.Tensor | float",
    dtype: "torch.dtype | None" = None,
    *,
    block: tuple[int, int] | None = None,
) -> PackedTensor:
    """Return integer codes and their steps in stored form, codec `int`, on the CPU.

    `decompress` gives `float32(code) * step`, rounded to nearest even to `dtype`, bit for bit.

    Args:
        codes: Integers within +-2**24, any shape; rows are all dimensions but the last.
        steps: `(cols,)` is one a column, `(rows, 1)` one a row, a number one for all,
            `(rows, cols / 128)` one for 128 columns of a row, and so on. 0, or finite and at least
            2**-126 in magnitude; stored exactly, in 16 bits each where they came from
            `endor.codecs.integer.round_steps`.
        dtype: Element type of the dense tensor: bfloat16 (None), float16 or float32.
        block: Rows and columns that share a step, where they do not divide the shape.

    Raises:
        DTypeError: The codes are no integers, or `dtype` is another type.
        ConfigError: A code or a step is out of range.
        ShapeError: The shapes do not fit.
    """
    import torch

    item = endor_dtype(dtype or torch.bfloat16)
    values = steps.detach().cpu().float().numpy() if isinstance(steps, torch.Tensor) else steps
    encoded = kernels.integer.encode(codes.detach().cpu().numpy(), values, item, block=block)
    return PackedTensor(encoded.spec, encoded)


def decompress(packed: PackedTensor, *, out: "torch.Tensor | None" = None) -> "torch.Tensor":
    """Write the dense form of `packed` and return it.

    Bit-exact: a stored element keeps its bits (NaN payloads, -0.0); an absent one becomes +0.0.

    Args:
        packed: Packed weight of any shape.
        out: Destination of the same shape and element type, row-major, on `packed.device`.
            Allocated when omitted. Its old content is lost even when this raises.

    Returns:
        `out`. On CUDA the write is ordered on torch's current stream, not finished.

    Raises:
        ShapeError: `out` has another shape, element type, device or layout.
        FormatError: The stored arrays contradict each other.
    """
    import torch

    if out is None:
        out = torch.empty(packed.shape, dtype=packed.dtype, device=packed.device)
    elif (
        out.shape != packed.shape
        or out.dtype != packed.dtype
        or out.device.type != packed.device.type
        or not out.is_contiguous()
    ):
        raise ShapeError(
            f"out must be a contiguous {packed.dtype} tensor of shape {tuple(packed.shape)} on "
            f"{packed.device}, got {out.dtype} {tuple(out.shape)} on {out.device}"
        )
    if packed.device.type == "cpu":
        codecs.validate(packed.data)
        kernels.decode(packed.data, bits_of(out).reshape(-1))
    else:
        from endor.kernels import gpu

        gpu.decode(packed.data, out)
    return out


def bits_of(tensor: "torch.Tensor") -> np.ndarray:
    """Return a view of a CPU tensor's bits: unsigned, same shape; a copy if not contiguous."""
    import torch

    item = endor_dtype(tensor.dtype)
    if not tensor.is_contiguous():
        tensor = tensor.contiguous()
    signed = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[item.itemsize]
    flat: np.ndarray = tensor.reshape(-1).view(signed).numpy()
    return flat.view(item.uint).reshape(tuple(tensor.shape))


def plain_matrix(weight: "torch.Tensor") -> Encoded:
    """Return a view of a dense CPU matrix that `kernels.matvec` multiplies by as it lies there."""
    item = endor_dtype(weight.dtype)
    spec = TensorSpec(tuple(weight.shape), item, "raw", bitmap=False, nnz=weight.numel())
    return Encoded(spec, {"values": bits_of(weight.detach()).reshape(-1)})


def tensor_of(
    bits: np.ndarray, dtype: DType, shape: tuple[int, ...] | None = None
) -> "torch.Tensor":
    """Return a torch tensor over the memory of `bits`: the inverse of `bits_of`.

    Args:
        bits: Unsigned, of the tensor's shape; flat bytes for elements narrower than one.
        dtype: Element type.
        shape: In elements; needed where `bits` is flat.

    Raises:
        DTypeError: This torch has no such element type, or cannot pair the elements.
    """
    import torch

    flat = torch.from_numpy(bits.reshape(-1).view(f"<i{dtype.itemsize}")).view(torch_dtype(dtype))
    return flat.reshape(bits.shape if shape is None else torch_shape(shape, dtype))


def torch_shape(shape: tuple[int, ...], dtype: DType) -> tuple[int, ...]:
    """Return the shape that torch gives a tensor: it counts pairs of elements of half a byte.

    Raises:
        DTypeError: They cannot be paired.
    """
    if not dtype.bits:
        return shape
    if not shape or shape[-1] % 2:
        raise DTypeError(f"torch has no {dtype.name} tensor of shape {list(shape)}")
    return *shape[:-1], shape[-1] // 2


def endor_shape(tensor: "torch.Tensor", dtype: DType) -> tuple[int, ...]:
    """Return the shape of a torch tensor in elements: the inverse of `torch_shape`."""
    shape = tuple(tensor.shape)
    return (*shape[:-1], 2 * shape[-1]) if dtype.bits and shape else shape
