"""Pruning: which weights become zero, and what the others become to make up for it.

Start at `contract.py`: options, the table of methods, and the two protocols they follow.

Modules (who needs what):
- contract     Pattern, PruneOptions, Method, METHODS; no torch
- select       exact counts with ties broken by index: `keep_mask`, `keep_mask_rows`
- nm           N:M groups: `nm_mask(score, kept, group) -> bool tensor, True = keep`
- magnitude, wanda, sparsegpt, admm, alps    one method each
- linalg, splitting    damped factors; the iteration that admm and alps share
- finetune     a pruned layer's survivors, trained to do what the dense layer did
- allocation   a sparsity for each layer
- calibration  text to token windows
- masks        masks in a file, and held while survivors are trained; `mask_writer` writes them
- heap         how malloc serves all this
- stream       layer by layer through a checkpoint that does not fit; `source` hands its tensors out
"""

from endor.pruning.contract import METHODS, Method, Pattern, PruneOptions
from endor.pruning.masks import HeldMasks, describe_masks, hold_masks, load_masks

__all__ = [
    "METHODS",
    "HeldMasks",
    "Method",
    "Pattern",
    "PruneOptions",
    "describe_masks",
    "hold_masks",
    "load_masks",
]
