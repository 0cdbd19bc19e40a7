"""Counting how often neurons are active: of the model as it was packed."""

from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from endor.checkpoint.companions import COUNTS_NAME
from endor.checkpoint.neuron_counts import NeuronCounts
from endor.checkpoint.neurons import first_matrices
from endor.checkpoint.pack_options import Made
from endor.checkpoint.sources.contract import CheckpointSource
from endor.checkpoint.sources.packed import PackedSource
from endor.pruning.contract import Progress, PruneOptions

if TYPE_CHECKING:
    import torch

    from endor.pruning.feed_forward import FeedForwardPasses


def counting(
    source: CheckpointSource,
    options: PruneOptions,
    matrices: frozenset[str],
    progress: Progress | None = None,
) -> Mapping[str, Made]:
    """Return what makes the file of counts, given a packed checkpoint: see `PackOptions.made`.

    What stands in the way of a calibration is found now, before anything is packed.

    Args:
        source: The model, before it is packed.
        options: How to calibrate; nothing is pruned.
        matrices: Names of those that are stored by neuron.
        progress: Called with layers done, layers in all, and what goes on.

    Raises:
        PruningError, CheckpointError, BackendError: See `FeedForwardPasses`.
        ConfigError: The calibration text is too short.
    """
    from endor.pruning.feed_forward import FeedForwardPasses
    from endor.pruning.source import explained

    ids, about = windows_for(source, options, matrices)

    def make(folder: Path) -> bytes:
        with closing(PackedSource(folder)) as packed, explained(folder):
            stored = stored_by_neuron(packed)
            if not stored:  # no codec made any of them smaller
                return NeuronCounts(ids.numel(), {}, about).to_bytes(packed.layouts)
            firsts = {name: first_matrices(name) for name in stored}
            passes = FeedForwardPasses(packed, options, firsts)
            with scratch_folder(options) as scratch:
                active = count_active(passes, ids, scratch, progress)
            counts = {name: found.numpy() for name, found in active.items()}
            return NeuronCounts(ids.numel(), counts, about).to_bytes(packed.layouts)

    return {COUNTS_NAME: make}


def windows_for(
    source: CheckpointSource,
    options: PruneOptions,
    matrices: frozenset[str],
    most_tokens: int | None = None,
) -> "tuple[torch.Tensor, dict[str, Any]]":
    """Return calibration windows, and what is said of them; arguments and errors as for `counting`.

    Args:
        source: As there.
        options: As there.
        matrices: As there.
        most_tokens: Only as many, of windows all over the texts.
    """
    from endor.pruning.calibration import calibration_windows, shipped_texts
    from endor.pruning.feed_forward import FeedForwardPasses
    from endor.pruning.source import explained

    with explained(source.path):
        FeedForwardPasses(source, options, {name: first_matrices(name) for name in matrices})
    ids = calibration_windows(source.directory, options)
    if most_tokens is not None and ids.numel() > most_tokens:
        count = max(1, most_tokens // ids.shape[1])
        ids = ids[[at * len(ids) // count for at in range(count)]]
    texts = [path.name for path in options.calibration or shipped_texts()]
    about = {
        "windows": len(ids),
        "seq_len": options.seq_len,
        "seed": options.seed,
        "texts": texts,
    }
    return ids, about


def stored_by_neuron(packed: PackedSource) -> set[str]:
    """Return the names of the matrices that are stored by neuron."""
    return {
        name
        for layout in packed.layouts
        for name, entry in layout.tensors.items()
        if entry.spec.transposed
    }


def count_active(
    passes: "FeedForwardPasses",
    ids: "torch.Tensor",
    scratch: Path,
    progress: Progress | None = None,
) -> "dict[str, torch.Tensor]":
    """Return in how many tokens each neuron is not zero, int32 `(neurons,)` by matrix."""
    import torch

    active: dict[str, torch.Tensor] = {}
    for seen in passes.run(ids, scratch, progress):
        found = torch.count_nonzero(seen.activation, dim=0).to("cpu", torch.int32)
        name = seen.block.matrix
        active[name] = active[name].add_(found) if name in active else found
    return active


@contextmanager
def scratch_folder(options: PruneOptions) -> Iterator[Path]:
    """Yield where activations lie that do not fit in memory."""
    from endor.pruning.scratch import ScratchFolder

    if options.scratch is not None:
        options.scratch.mkdir(parents=True, exist_ok=True)
        yield options.scratch
        return
    folder = ScratchFolder()
    try:
        yield folder.path
    finally:
        folder.remove()
