"""Pruning: which weights become zero, and what the others become to make up for it.

Start at `contract.py`: options, the table of methods, and the two protocols they follow.

Modules (who needs what):
- contract     Pattern, PruneOptions, Method, METHODS; no torch
- select       exact counts with ties broken by index: `keep_mask`, `keep_mask_rows`
- methods      magnitude, wanda, sparsegpt, admm, alps, and what they share
- linalg       damped factors, for methods and quantisation
- finetune     a pruned layer's survivors, trained to do what the dense layer did
- allocation   a sparsity for each layer
- calibration  text to token windows
- masks        masks in a file, and held while survivors are trained; `mask_writer` writes them
- heap         how malloc serves all this
- stream       layer by layer through a checkpoint that does not fit; `source` hands its tensors out
- finished     the layers that it is done with, in a folder; `coding` those in codes
- sensitivity  how much a layer's output changes when a matrix does
- estimate, divergence    what is said of a run, and how far its predictions are from the dense ones
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
