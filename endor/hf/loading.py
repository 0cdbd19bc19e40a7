"""Handing transformers what of a packed checkpoint it is to load: what is not kept packed."""

import os
import shutil
import tempfile
import weakref
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from endor import kernels
from endor.dependencies import changed
from endor.storage import (
    FileLayout,
    HostBuffer,
    RecordReader,
    TensorEntry,
    align_up,
    bind_checked,
    check_record,
)
from endor.storage.positioned import write_at
from endor.storage.safetensors import Entry, file_head
from endor.storage.seal import PAD_PREFIX

_PLAIN_ALIGN = 64
"""Alignment of tensors that transformers maps; torch's products vary below 16 bytes."""

_IN_MEMORY = Path("endor-plain")
"""Name of the file in memory, for messages."""

_COMPARED = 64
"""Elements of each parameter that are compared after loading."""


class PlainFile:
    """A safetensors file in memory that transformers loads in place of the packed ones.

    Attributes:
        path: Its name, until it is closed; it closes itself when it is forgotten.
    """

    def __init__(self, descriptor: int) -> None:
        """Own `descriptor`, and give it a name that transformers takes for a safetensors file."""
        folder = Path(tempfile.mkdtemp(prefix="endor-"))
        self.path = str(folder / "plain.safetensors")
        self._finish = weakref.finalize(self, _remove, folder, descriptor)
        Path(self.path).symlink_to(f"/proc/self/fd/{descriptor}")

    def close(self) -> None:
        """Give up the file; what was mapped of it stays until it is no longer used."""
        self._finish()


def _remove(folder: Path, descriptor: int) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    os.close(descriptor)


def plain_file(
    layouts: Sequence[FileLayout], skip: Collection[str], reader: RecordReader, *, verify: bool
) -> PlainFile:
    """Return a file with the dense form of every tensor but those in `skip`.

    transformers maps what it loads: left to the packed files, a parameter would kill the process
    with a bus error, or silently change, when its file does. From here it gets bytes that were
    checked, that nothing can change, and that are aligned; each is in memory once.

    Args:
        layouts: The checkpoint's files.
        skip: Tensors that stay packed.
        reader: Reads the records.
        verify: Check each record that is read.

    Raises:
        ChecksumError: A record is damaged.
        FormatError: A tensor breaks the format.
        ReadError: A record cannot be read.
    """
    wanted = [
        (layout, entry)
        for layout in layouts
        for entry in layout.tensors.values()
        if entry.name not in skip
    ]
    header, starts = _plain_header([entry for _, entry in wanted])
    file = os.memfd_create(_IN_MEMORY.name)
    try:
        write_at(file, header, 0, _IN_MEMORY)
        held: tuple[FileLayout, str, np.ndarray] | None = None
        for (layout, entry), start in zip(wanted, starts, strict=True):
            if held is None or (held[0] is not layout or held[1] != entry.record):
                record = layout.records[entry.record]
                buffer = HostBuffer(record.nbytes)
                reader.read(record, buffer)
                if verify:
                    check_record(layout, record.name, buffer.array)
                held = (layout, entry.record, buffer.array)
            encoded = bind_checked(layout, entry.name, held[2])
            dense = np.empty(entry.spec.numel, dtype=entry.spec.dtype.uint)
            kernels.decode(encoded, dense)
            write_at(file, dense.data.cast("B"), len(header) + start, _IN_MEMORY)
        os.ftruncate(file, len(header) + (starts[-1] + _padded(wanted[-1][1]) if wanted else 0))
    except BaseException:
        os.close(file)
        raise
    return PlainFile(file)


def check_taken(plain: PlainFile, model: Any) -> None:
    """Raise unless transformers loaded the model's parameters from `plain`.

    Its list of files was replaced under its hands; had it kept another one, the parameters would be
    random. The beginning of each parameter that has a stored name is compared; some may have been
    converted on the way, but never all.

    Raises:
        DependencyError: None of them has the stored bytes, or one was left without any.
    """
    from safetensors import safe_open

    own = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())
    empty = next((name for name, item in own.items() if item.is_meta), None)
    if empty is not None:
        raise changed("transformers", f"loading left {empty} without a value")
    outcomes = []
    with safe_open(plain.path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 - it is no dict
            stored = own.get(name)
            if stored is not None and list(stored.shape) == file.get_slice(name).get_shape():
                wanted = file.get_tensor(name).flatten()[:_COMPARED].to(stored.dtype)
                found = stored.detach().flatten()[:_COMPARED].cpu()
                outcomes.append(torch.equal(found.view(torch.uint8), wanted.view(torch.uint8)))
    if outcomes and not any(outcomes):
        raise changed("transformers", "it did not load the parameters that Endor handed to it")


def _plain_header(entries: Sequence[TensorEntry]) -> tuple[bytes, list[int]]:
    """Return the header of a file with `entries`, aligned, and where the data of each starts."""
    fields: list[tuple[str, Entry]] = []
    starts, at = [], 0
    for number, entry in enumerate(entries):
        spec = entry.spec
        stop, padded = at + spec.dense_nbytes, at + _padded(entry)
        fields.append((entry.name, Entry(spec.dtype.name, spec.shape, at, stop)))
        if padded > stop:
            fields.append((f"{PAD_PREFIX}{number}", Entry("U8", (padded - stop,), stop, padded)))
        starts.append(at)
        at = padded
    return file_head(fields, align=_PLAIN_ALIGN), starts


def _padded(entry: TensorEntry) -> int:
    return align_up(entry.spec.dense_nbytes, _PLAIN_ALIGN)
