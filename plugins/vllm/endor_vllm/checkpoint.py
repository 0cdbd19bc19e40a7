"""The tensors of a packed checkpoint, one by one: dense, with their stored form beside."""

from collections.abc import Iterator
from pathlib import Path

import torch

from endor import kernels
from endor.checkpoint.index import read_packed_index
from endor.checkpoint.loadable import open_layouts
from endor.dtypes import torch_dtype
from endor.errors import FormatError
from endor.packed import bits_of, torch_shape
from endor.storage import FileLayout, HostBuffer, bind_checked, check_bytes, open_reader
from endor_vllm.shares import Stored, mark


def tensors(directory: Path) -> Iterator[tuple[str, torch.Tensor, Stored]]:
    """Yield name, dense tensor and stored form of everything in a packed checkpoint.

    Every checksum, structure and coded stream is checked on the way. One record is in memory at a
    time, beside what a caller keeps.

    Raises:
        CheckpointError: There is no packed checkpoint, or it is incomplete.
        FormatError: It is damaged; see its subclasses.
        ReadError: It cannot be read.
    """
    index = read_packed_index(directory)
    with open_reader() as reader:
        for layout in open_layouts([directory / file for file in index.files]):
            for record in layout.records.values():
                buffer = HostBuffer(record.nbytes)
                reader.read(record, buffer)
                check_bytes(record, buffer.array)
                for name in record.tensors:
                    yield name, *_expanded(layout, name, buffer)


def _expanded(layout: FileLayout, name: str, buffer: HostBuffer) -> tuple[torch.Tensor, Stored]:
    encoded = bind_checked(layout, name, buffer.array)
    spec = encoded.spec
    # Models are built on the device that they run on; what is read begins on the processor.
    dense = torch.empty(
        torch_shape(spec.shape, spec.dtype), dtype=torch_dtype(spec.dtype), device="cpu"
    )
    try:
        kernels.decode(encoded, bits_of(dense).reshape(-1))
    except FormatError as error:
        raise FormatError(f"{layout.path}: {name}: {error}") from None
    return dense, mark(dense, name, encoded)
