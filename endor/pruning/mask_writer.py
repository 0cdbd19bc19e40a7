"""Writing the masks that a pruning method finds in a checkpoint, and none of its weights."""

import json
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from endor import kernels
from endor.checkpoint.pipeline import OrderedWork
from endor.checkpoint.plan import plan_units
from endor.checkpoint.reading import TensorLoader, WeightPruner
from endor.checkpoint.select import select
from endor.checkpoint.sources.contract import CheckpointSource, SourceTensor
from endor.checkpoint.targets import check_source
from endor.errors import CheckpointError, ConfigError, OutputExistsError
from endor.pruning.masks import BITMASK, KEY, SHAPE, bitmask_shape, to_bitmask
from endor.storage import TemporaryFile, remove_stale_temporaries
from endor.storage.positioned import write_at
from endor.storage.safetensors import Entry, file_head


@dataclass(frozen=True, slots=True)
class MaskReport:
    """How the writing went.

    Attributes:
        path: The mask file.
        pruned_tensors: Masks in it.
        weights: Weights that they decide on.
        zeros: Weights that they take away.
        nbytes: Size of the file.
        seconds: Wall time.
    """

    path: Path
    pruned_tensors: int
    weights: int
    zeros: int
    nbytes: int
    seconds: float

    @property
    def sparsity(self) -> float:
        """Share of the weights that are taken away."""
        return self.zeros / self.weights if self.weights else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Return fields and the sparsity for JSON."""
        return asdict(self) | {"path": str(self.path), "sparsity": self.sparsity}


def write_masks(
    source: CheckpointSource,
    out: Path,
    *,
    prune: WeightPruner | None = None,
    description: Mapping[str, Any] | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    overwrite: bool = False,
    threads: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> MaskReport:
    """Write a mask file, see `endor.pruning.masks`. A weight that is zero after pruning is absent.

    Args:
        source: The dense checkpoint, or one that yields pruned tensors.
        out: The file; it appears when all is done.
        prune: Applied to the tensors; None if `source` yields them pruned.
        description: What the file says about the method, as JSON values; what `prune` says of
            itself when empty.
        include: Patterns of tensors besides the matrices of the layers.
        exclude: Patterns of tensors to leave out.
        overwrite: Replace `out`.
        threads: Workers; every CPU when omitted.
        progress: Called with dense bytes done and in total.

    Raises:
        OutputExistsError: `out` exists and `overwrite` is not set, or it is no file.
        CheckpointError: `out` is the source, or part of it.
        ConfigError: Nothing is selected.
        PruningError, DTypeError: A selected tensor cannot be pruned.
        OSError: From the file system.
    """
    began = time.perf_counter()
    check_mask_target(out, source.path, overwrite=overwrite)
    selected = select(source.tensors.values(), include=include, exclude=exclude)
    units = plan_units(source.tensors.values(), selected)
    tensors = [tensor for unit in units for tensor in unit.tensors if tensor.name in selected]
    if not tensors:
        raise ConfigError(f"{source.path}: no tensor is a matrix of a layer; name some (--include)")
    said = dict(description or {}) or getattr(prune, "describe", dict)()
    head, places, nbytes = _layout(tensors, said)
    loader = TensorLoader(source, prune, selected)

    def load(tensor: SourceTensor) -> tuple[np.ndarray, int]:
        loaded = loader.load(tensor)
        kept = loaded.bits != 0
        loader.pool.give(loaded.buffer)
        return to_bitmask(kept), kept.size - int(np.count_nonzero(kept))

    work = OrderedWork(
        load,
        lambda tensor: tensor.nbytes,
        threads=kernels.thread_count(threads),
        budget_bytes=loader.budget_bytes,
        prepare=loader.prepare,
    )
    total = sum(tensor.nbytes for tensor in tensors)
    zeros = done = 0
    out.parent.mkdir(parents=True, exist_ok=True)
    remove_stale_temporaries(out.parent, out.name)
    file = TemporaryFile(out)
    try:
        write_at(file.fd, head, 0, out)
        with closing(work.run(tensors)) as results:
            for tensor, (bitmask, absent) in results:
                write_at(file.fd, bitmask.tobytes(), places[tensor.name], out)
                zeros += absent
                done += tensor.nbytes
                if progress is not None:
                    progress(done, total)
        file.commit()
    finally:
        file.discard()
    weights = sum(tensor.numel for tensor in tensors)
    return MaskReport(out, len(tensors), weights, zeros, nbytes, time.perf_counter() - began)


def check_mask_target(out: Path, source: Path, *, overwrite: bool) -> None:
    """Raise unless `write_masks` may write to `out`; see there."""
    if not os.path.lexists(out):
        return
    if out.is_symlink() or not out.is_file():
        raise OutputExistsError(f"{out}: exists and is no file; choose another name")
    check_source(out.absolute(), source)
    if out.resolve().is_relative_to(source.resolve()):
        raise CheckpointError(f"{out}: is part of the input {source}; choose another file")
    if not overwrite:
        raise OutputExistsError(f"{out}: exists already; choose another file, or add --overwrite")


def _layout(
    tensors: Sequence[SourceTensor], description: Mapping[str, Any]
) -> tuple[bytes, dict[str, int], int]:
    """Return the file up to the first bitmask, where each bitmask goes, and the size of the file.

    The shapes come first: int64 wants an offset divisible by 8.
    """
    entries: list[tuple[str, Entry]] = []
    shapes, end = b"", 0

    def add(key: str, kind: str, shape: tuple[int, ...], nbytes: int) -> None:
        nonlocal end
        entries.append((key, Entry(kind, shape, end, end + nbytes)))
        end += nbytes

    for tensor in tensors:
        raw = np.array(tensor.shape, dtype="<i8").tobytes()
        add(tensor.name + SHAPE, "I64", (len(tensor.shape),), len(raw))
        shapes += raw
    for tensor in tensors:
        shape = bitmask_shape(tensor.shape)
        add(tensor.name + BITMASK, "U8", shape, math.prod(shape))
    head = file_head(entries, {KEY: json.dumps(dict(description))})
    starts = {key.removesuffix(BITMASK): entry.start for key, entry in entries[len(tensors) :]}
    places = {name: len(head) + start for name, start in starts.items()}
    return head + shapes, places, len(head) + end
