"""Endor: a sparse bitmap weight format, and the tools that pack, verify, stream and run it."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from endor import namesake
from endor.errors import EndorError
from endor.hf import register
from endor.version import __version__

if TYPE_CHECKING:
    from endor.checkpoint import inspect_checkpoint, unpack_checkpoint, verify_checkpoint
    from endor.hf import EndorConfig, load_model
    from endor.packed import PackedTensor, compress, decompress, pack_codes
    from endor.packing import pack_checkpoint
    from endor.packing.distributed import pack_distributed
    from endor.storage import load_file, safe_open, save_file


__all__ = [
    "EndorConfig",
    "EndorError",
    "PackedTensor",
    "__version__",
    "compress",
    "decompress",
    "inspect_checkpoint",
    "load_file",
    "load_model",
    "pack_checkpoint",
    "pack_codes",
    "pack_distributed",
    "safe_open",
    "save_file",
    "unpack_checkpoint",
    "verify_checkpoint",
]

_HOMES = {
    "EndorConfig": "endor.hf",
    "PackedTensor": "endor.packed",
    "compress": "endor.packed",
    "decompress": "endor.packed",
    "inspect_checkpoint": "endor.checkpoint",
    "load_file": "endor.storage",
    "load_model": "endor.hf",
    "pack_checkpoint": "endor.packing",
    "pack_codes": "endor.packed",
    "pack_distributed": "endor.packing.distributed",
    "safe_open": "endor.storage",
    "save_file": "endor.storage",
    "unpack_checkpoint": "endor.checkpoint",
    "verify_checkpoint": "endor.checkpoint",
}


def __getattr__(name: str) -> Any:
    """Import a public name on first use, so that `import endor` stays light."""
    try:
        home = _HOMES[name]
    except KeyError:
        raise AttributeError(f"module 'endor' has no attribute {name!r}") from None
    value = getattr(import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)


namesake.warn()
register.install()
