"""Which tensors of a model calibration renews."""

from endor.checkpoint.select import is_linear
from endor.checkpoint.sources.contract import CheckpointSource
from endor.errors import PruningError
from endor.pruning.contract import PruneOptions
from endor.pruning.skeleton import Skeleton


def renewed(
    skeleton: Skeleton, source: CheckpointSource, options: PruneOptions, selected: frozenset[str]
) -> tuple[dict[str, int], tuple[str, ...]]:
    """Return the layer of each tensor that is renewed, and selected ones outside of all layers.

    Raises:
        PruningError: There are none, or one outside was asked for by name.
    """
    names = {
        piece.name: index
        for index in range(len(skeleton.layers))
        for pieces in skeleton.pieces(index).values()
        for piece in pieces
        if piece.name in selected and options.selects(piece.name)
    }
    stray = sorted(name for name in selected - names.keys() if options.selects(name))
    asked = [name for name in stray if not is_linear(source.tensors[name])]
    if asked or not names:
        name = (asked or stray or ["nothing chosen"])[0]
        raise PruningError(
            f"{name}: lies outside the decoder layers, where calibration does not reach; "
            f"leave it out (--exclude '{name}'), or prune with magnitude"
        )
    return names, tuple(stray)
