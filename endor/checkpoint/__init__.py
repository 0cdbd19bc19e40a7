"""Checkpoint directories: read, select, prune, pack, unpack, verify, inspect.

Modules (who needs what):
- sources      one class for each format on one contract, `CheckpointSource`: dense tensors by name
- directory    which files are the model; config.json; an index against its shards
- open         `open_source(path)`: the class that reads what lies there
- select, plan which tensors are packed; records in execution order
- convert      dense to packed; dense: packed (or pruned) to dense; both write through output
- output       directories that appear whole, and resume
- composite     folders of several models, each converted by itself
- verify, inspect
"""

from endor.checkpoint.api import (
    inspect_checkpoint,
    unpack_checkpoint,
    verify_checkpoint,
)
from endor.checkpoint.inspect import Inspection, TensorRow
from endor.checkpoint.open import open_source
from endor.checkpoint.report import DenseReport, PackReport, Progress, Sizes
from endor.checkpoint.sources.contract import CheckpointSource, SourceTensor
from endor.checkpoint.verify import VerifyReport

__all__ = [
    "CheckpointSource",
    "DenseReport",
    "Inspection",
    "PackReport",
    "Progress",
    "Sizes",
    "SourceTensor",
    "TensorRow",
    "VerifyReport",
    "inspect_checkpoint",
    "open_source",
    "unpack_checkpoint",
    "verify_checkpoint",
]
