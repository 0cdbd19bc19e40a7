"""Whole files of torch tensors, packed or dense: the everyday interface."""

import math
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

import numpy as np

from endor import kernels
from endor.codecs import Encoded, TensorSpec
from endor.dtypes import endor_dtype, torch_dtype
from endor.errors import ConfigError, DTypeError, ReadError
from endor.packed import PackedTensor, bits_of, compress, decompress, endor_shape, torch_shape
from endor.storage.buffers import HostBuffer
from endor.storage.check import bind_checked, check_bytes
from endor.storage.layout import FileLayout, no_tensor
from endor.storage.plain import PlainFile
from endor.storage.readers import open_reader
from endor.storage.safetensors import Header
from endor.storage.seal import is_sealed
from endor.storage.slices import TensorSlice
from endor.storage.source import ReaderKind
from endor.storage.verify import read_records
from endor.storage.writer import FileWriter, header_capacity

if TYPE_CHECKING:
    import torch


FRAMEWORKS = ("pt", "torch", "pytorch")
"""Names under which safetensors knows torch."""


def save_file(
    tensors: "Mapping[str, torch.Tensor | PackedTensor]",
    path: Path | str,
    *,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a packed file; it replaces an existing one at the last moment, whole.

    Every tensor gets a record of its own, in the order of `tensors`. Torch tensors are stored as
    they are: use `compress` for those that shall shrink.

    Args:
        tensors: Tensor per name.
        path: The file; its directory must exist.
        metadata: Strings to keep in the file; keys `format` and `endor*` are taken.

    Raises:
        DTypeError: A value cannot be stored.
        FormatError: Names collide.
        OSError: The disk is full, the directory is missing, ...
    """
    specs = {name: _spec_of(name, value) for name, value in tensors.items()}
    capacity = header_capacity({name: {name: spec} for name, spec in specs.items()}, metadata)
    with FileWriter(path, header_capacity=capacity, metadata=metadata) as writer:
        for name, value in tensors.items():
            with writer.record(name) as record:
                record.add(name, _encoded_of(value, specs[name]))


def load_file(path: Path | str, device: "str | torch.device" = "cpu") -> "dict[str, torch.Tensor]":
    """Return the dense tensors of a packed or plain safetensors file, in file order.

    Raises:
        FormatError: The file is damaged; see its subclasses.
        ReadError, OSError: The file cannot be read.
    """
    with safe_open(path, device=device) as file:
        return file._load_all()


class safe_open:
    """A packed or plain safetensors file, opened for reading; a context manager.

    Whatever is returned has passed its checksum and structural checks (of a plain file:
    what safetensors checks), and does not change when the file is closed.

        with endor.safe_open("model.safetensors", "pt") as file:
            weight = file.get_tensor("model.embed_tokens.weight")

    Arguments and methods are those of `safetensors.safe_open`, and `get_packed`.

    Args:
        path: The file.
        framework: `"pt"` (or `"torch"`, `"pytorch"`): tensors are torch's.
        device: Where tensors go.
        reader: How records are read; a forced kind that cannot run raises.

    Raises:
        ConfigError: Another framework is asked for.
        FormatError: The header is damaged; see its subclasses.
        OSError: The file cannot be opened.
    """

    def __init__(
        self,
        path: Path | str,
        framework: str = "pt",
        device: "str | int | torch.device" = "cpu",
        *,
        reader: ReaderKind = "auto",
    ) -> None:
        if framework not in FRAMEWORKS:
            raise ConfigError(
                f"framework: must be one of {', '.join(FRAMEWORKS)}, got {framework!r:.40}; "
                "a device is the third argument, or device=..."
            )
        self._path = Path(path)
        self._device = device if not isinstance(device, int) else f"cuda:{device}"
        self._closed = False
        self._layout: FileLayout | None = None
        self._plain: PlainFile | None = None
        self._shared: tuple[str, np.ndarray] | None = None
        header = Header.read(self._path)
        if is_sealed(header):
            self._layout = FileLayout.from_header(header)
            self._names, self._metadata = list(self._layout.tensors), self._layout.metadata
        else:
            self._plain = PlainFile(header)
            self._names, self._metadata = self._plain.names, self._plain.metadata
        self._reader = open_reader(reader)

    def __repr__(self) -> str:
        kind = "plain" if self._layout is None else "packed"
        closed = ", closed" if self._closed else ""
        return f"safe_open({str(self._path)!r}, {kind}, {len(self._names)} tensors{closed})"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file. May be called twice; only names and metadata are left afterwards."""
        self._closed = True
        self._reader.close()
        self._shared = None
        if self._plain is not None:
            self._plain.close()
        self._plain = None

    def keys(self) -> list[str]:
        """Return the names of the tensors: in file order if packed, sorted if plain."""
        return list(self._names)

    def metadata(self) -> dict[str, str]:
        """Return the strings that the file's writer attached."""
        return dict(self._metadata)

    def get_tensor(self, name: str) -> "torch.Tensor":
        """Return the tensor `name`, dense.

        Raises:
            CheckpointError: The file has no such tensor.
            FormatError: Its bytes are damaged.
            ReadError: They cannot be read, or the file was closed.
        """
        self._check(name)
        if self._layout is None:
            return self._get_plain(name)
        record_bytes = self._record_bytes(self._layout, name, keep=True)
        return self._expand(bind_checked(self._layout, name, record_bytes))

    def get_slice(self, name: str) -> TensorSlice:
        """Return the tensor `name` to be indexed; it is read when it is.

        Raises:
            CheckpointError: The file has no such tensor.
            ReadError: The file was closed.
        """
        self._check(name)
        if self._layout is not None:
            spec = self._layout.tensors[name].spec
            shape, dtype = spec.shape, spec.dtype.name
        else:
            assert self._plain is not None
            shape, dtype = self._plain.shape_of(name)
        return TensorSlice(name, tuple(shape), dtype, lambda: self.get_tensor(name))

    def get_packed(self, name: str) -> PackedTensor:
        """Return the tensor `name` as it is stored; of a plain file, in codec `dense`.

        Errors as for `get_tensor`.
        """
        self._check(name)
        if self._layout is None:
            return compress(self._get_plain(name), codec="dense")
        record_bytes = self._record_bytes(self._layout, name, keep=False)
        encoded = bind_checked(self._layout, name, record_bytes)
        return PackedTensor(encoded.spec, encoded).to(self._device)

    def _check(self, name: str) -> None:
        if self._closed:
            raise ReadError(f"{self._path}: the file is closed; open it again")
        if name not in self._names:
            raise no_tensor(self._path, name, self._names)

    def _record_bytes(self, layout: FileLayout, name: str, *, keep: bool) -> np.ndarray:
        """Read and check a record; kept for the next call if it holds more tensors.

        What leaves this object inside a `PackedTensor` is not kept: its owner may change it.
        """
        record = layout.record_of(name)
        if self._shared and self._shared[0] == record.name:
            record_bytes = self._shared[1]
        else:
            buffer = HostBuffer(record.nbytes)
            self._reader.read(record, buffer)
            record_bytes = buffer.array
            check_bytes(record, record_bytes)
        keep = keep and len(record.tensors) > 1
        self._shared = (record.name, record_bytes) if keep else None
        return record_bytes

    def _expand(self, encoded: Encoded) -> "torch.Tensor":
        import torch

        spec = encoded.spec
        if torch.device(self._device).type == "cuda":
            return decompress(PackedTensor(spec, encoded).to(self._device))
        out = torch.empty(torch_shape(spec.shape, spec.dtype), dtype=torch_dtype(spec.dtype))
        kernels.decode(encoded, bits_of(out).reshape(-1))
        return out.to(self._device)

    def _load_all(self) -> "dict[str, torch.Tensor]":
        if self._layout is None:
            return {name: self._get_plain(name) for name in self._names}
        out = {}
        for record, record_bytes in read_records(self._layout, self._reader):
            check_bytes(record, record_bytes)
            for name in record.tensors:
                out[name] = self._expand(bind_checked(self._layout, name, record_bytes))
        return out

    def _get_plain(self, name: str) -> "torch.Tensor":
        assert self._plain is not None
        return self._plain.get_tensor(name).to(self._device)


def _spec_of(name: str, value: "torch.Tensor | PackedTensor") -> TensorSpec:
    import torch

    if isinstance(value, PackedTensor):
        return value.spec
    if not isinstance(value, torch.Tensor):
        raise DTypeError(
            f"{name}: must be a torch tensor or a PackedTensor, got {type(value).__name__}"
        )
    if value.layout != torch.strided or value.device.type == "meta" or value.is_quantized:
        raise DTypeError(
            f"{name}: must be an ordinary tensor with data, got {value.layout} on {value.device}"
        )
    try:
        dtype = endor_dtype(value.dtype)
    except DTypeError as error:
        raise DTypeError(f"{name}: {error}") from None
    shape = endor_shape(value, dtype)
    return TensorSpec(shape, dtype, "dense", bitmap=False, nnz=math.prod(shape))


def _encoded_of(value: "torch.Tensor | PackedTensor", spec: TensorSpec) -> Encoded:
    if isinstance(value, PackedTensor):
        encoded: Encoded = value.to("cpu").data
        return encoded
    bits = bits_of(value.detach().cpu())
    return Encoded(spec, {"": bits.reshape(spec.dtype.unit_shape(spec.shape))})
