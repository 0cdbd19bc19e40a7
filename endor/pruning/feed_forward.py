"""What feed-forward blocks are given, and their activations, for every token of calibration text.

The windows pass through one layer after another, as in `stream`, and nothing is changed on the way.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from endor.checkpoint.sources.contract import CheckpointSource
from endor.errors import PruningError
from endor.models.pieces import is_whole
from endor.pruning.activations import batches
from endor.pruning.contract import Progress, PruneOptions
from endor.pruning.devices import torch_device
from endor.pruning.heap import reused_blocks
from endor.pruning.passes import batch_windows, embedded
from endor.pruning.skeleton import Skeleton


@dataclass(frozen=True, slots=True)
class Block:
    """A feed-forward block `W2 · act(W1 · x)`.

    Attributes:
        layer: The decoder layer.
        matrix: Name of W2 in the checkpoint.
        second: Name of its module inside the layer.
        first: The same of W1; of a gated block, the first of the two.
    """

    layer: int
    matrix: str
    second: str
    first: str


@dataclass(frozen=True, slots=True)
class Seen:
    """What one block saw of some tokens.

    Attributes:
        block: Which.
        inputs: What its first matrix was given, float32 `(tokens, hidden)`.
        activation: What its second was given, float32 `(tokens, neurons)`.
    """

    block: Block
    inputs: torch.Tensor
    activation: torch.Tensor


class FeedForwardPasses:
    """Shows what the feed-forward blocks of a model see of calibration text.

    Args:
        source: The checkpoint, dense or packed.
        options: How to calibrate: device, memory, trust.
        matrices: Names of the second matrices of the blocks to be watched, with those of the first
            ones that may stand before each. One outside of the decoder layers is left out.

    Attributes:
        blocks: The blocks, in the order of the layers.

    Raises:
        PruningError: The model cannot be run layer by layer, or no matrix is in any layer.
        CheckpointError: There is no config.json, or it does not fit the weights.
        BackendError: A library or device is missing.
    """

    def __init__(
        self,
        source: CheckpointSource,
        options: PruneOptions,
        matrices: Mapping[str, tuple[str, ...]],
    ) -> None:
        self._options = options
        self._device = torch_device(options.device)
        self._skeleton = Skeleton(source, self._device, trust_remote_code=options.trust_remote_code)
        self.blocks = tuple(
            block
            for layer in range(len(self._skeleton.layers))
            for block in self._blocks_of(layer, matrices)
        )
        if not self.blocks:
            raise PruningError(
                f"{source.path}: no feed-forward block of a decoder layer has one of "
                f"{', '.join(sorted(matrices)[:3])} as its second matrix; leave out the "
                "calibration"
            )

    def run(
        self, ids: torch.Tensor, scratch: Path, progress: Progress | None = None
    ) -> Iterator[Seen]:
        """Yield what the blocks see, layer by layer, and batch by batch in each.

        Args:
            ids: int64 `(windows, tokens)`.
            scratch: An existing folder for hidden states that do not fit in memory.
            progress: Called with layers done, layers in all, and what goes on.
        """
        skeleton, last = self._skeleton, self.blocks[-1].layer
        hidden, calls = embedded(skeleton, ids, self._options.memory_bytes, scratch)
        report = progress or (lambda done, total, what: None)
        report(0, last + 1, "counting")
        try:
            for index in range(last + 1):
                layer = skeleton.load_layer(index)
                watched = [block for block in self.blocks if block.layer == index]
                for start, stop in batches(len(ids), batch_windows(ids.shape[1])):
                    given = hidden.read(start, stop).to(self._device)
                    with torch.no_grad(), reused_blocks(), _watched(layer, watched) as seen:
                        hidden.write(start, calls[index].run(layer, given))
                    yield from seen
                skeleton.drop_layer(index)
                report(index + 1, last + 1, "counting")
        finally:
            hidden.close()

    def _blocks_of(self, layer: int, matrices: Mapping[str, tuple[str, ...]]) -> Iterator[Block]:
        """Yield the blocks of one layer."""
        module, pieces = self._skeleton.layers[layer], self._skeleton.pieces(layer)
        owner = {
            piece.name: parameter.rpartition(".")[0]
            for parameter, parts in pieces.items()
            for piece in parts
        }
        for parameter, parts in pieces.items():
            name = parts[0].name if len(parts) == 1 else ""
            if name not in matrices:
                continue
            second = owner[name]
            first = next((owner[each] for each in matrices[name] if each in owner), None)
            shape = module.get_parameter(parameter).shape
            if first is not None and is_whole(parts, shape, self._skeleton.shapes):
                yield Block(layer, name, second, first)


@contextmanager
def _watched(layer: nn.Module, blocks: list[Block]) -> Iterator[list[Seen]]:
    """Yield a list that gets what `blocks` see while the layer runs."""
    seen: list[Seen] = []
    inputs: dict[str, torch.Tensor] = {}

    def begin(block: Block) -> Any:
        def hook(_module: nn.Module, args: tuple[Any, ...]) -> None:
            inputs[block.matrix] = _flat(args[0])

        return hook

    def end(block: Block) -> Any:
        def hook(_module: nn.Module, args: tuple[Any, ...]) -> None:
            if block.matrix not in inputs:
                raise PruningError(
                    f"{block.matrix}: is used before {block.first}, so that it is not the second "
                    "matrix of a feed-forward block; leave out the calibration"
                )
            seen.append(Seen(block, inputs.pop(block.matrix), _flat(args[0])))

        return hook

    handles = []
    for block in blocks:
        first, second = (layer.get_submodule(name) for name in (block.first, block.second))
        handles.append(first.register_forward_pre_hook(begin(block)))
        handles.append(second.register_forward_pre_hook(end(block)))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _flat(inputs: torch.Tensor) -> torch.Tensor:
    return inputs.detach().reshape(-1, inputs.shape[-1])
