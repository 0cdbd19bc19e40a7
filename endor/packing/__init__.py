"""Packing, pruning and quantising a checkpoint: one call each for library and commands.

What is selected, how it becomes zero or integers, where it is written: `pruning.run` and
`quantization.run` say what the conversion reads, `checkpoint` converts.
"""

from endor.packing.pack import pack_checkpoint
from endor.packing.prune import prune_checkpoint, prune_to_masks

__all__ = ["pack_checkpoint", "prune_checkpoint", "prune_to_masks"]
